"""The command `python -m deepseek_vl.serve.api`."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from deepseek_vl.command_line import OneLineParser, positive, run_command, starting
from deepseek_vl.engine.limits import EngineLimits, RequestLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.arguments import add_arguments, open_engine, settings_of
from deepseek_vl.serve.listening import (
    END_SECONDS,
    add_listening,
    check_port,
    checked_origin,
    end_within,
    names_of,
)

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python -m deepseek_vl.serve.api",
        description="Serve a model over HTTP, as OpenAI does; requests may sample otherwise than the arguments say.",
    )
    add_arguments(parser, GenerationSettings(temperature=0.2), required=True)
    parser.add_argument("--model_name", help="what clients call it (default: the end of the path)")
    add_listening(parser, 8000)
    parser.add_argument(
        "--max_batch", type=positive, default=EngineLimits.max_rows, help="answers at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--max_waiting", type=positive, default=RequestLimits.waiting, help="requests in line (default: %(default)s)"
    )
    parser.add_argument(
        "--grace", type=positive, default=10, metavar="SECONDS",
        help="that running answers have to end when the server is told to stop (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--api_key", default=os.environ.get("DEEPSEEK_VL_API_KEY") or None,
        help="bearer key that clients must give (default: $DEEPSEEK_VL_API_KEY, or none)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-image-urls", nargs="*", metavar="DOMAIN", help="fetch images from public addresses, or these domains"
    )
    parser.add_argument(
        "--allow_origin", action="append", default=[], metavar="ORIGIN",
        help="a page's origin, as https://example.com or *, whose programs may ask from a browser; may be repeated",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    if args.api_key == "":
        raise ValueError("--api_key is empty; leave it out to serve everybody.")
    check_port(args.host, args.port)
    names = names_of(args.host, args.allowed_host)
    origins = [checked_origin(origin) for origin in args.allow_origin]
    with starting():
        from deepseek_vl.serve.api.fetch import ImageFetcher, checked_domain
    domains = [checked_domain(domain) for domain in args.allow_image_urls or ()]
    with starting():
        import uvicorn

        from deepseek_vl.kernels.memory import share_memory_between_threads
        from deepseek_vl.serve.api.app import create_app
        from deepseek_vl.serve.api.connection import connections
        from deepseek_vl.serve.api.service import Service

    share_memory_between_threads()
    logger.info("Loading %s ...", args.model_path)
    engine, processor = open_engine(args, args.model_path, args.max_batch)
    limits = RequestLimits(waiting=args.max_waiting)
    service = Service(
        name=args.model_name or os.path.basename(os.path.normpath(args.model_path)),  # noqa: PTH119  or a hub id
        engine=engine,
        processor=processor,
        settings=settings,
        key=args.api_key,
        names=names,
        limits=limits,
        fetcher=ImageFetcher(args.allow_image_urls is not None, domains, limits),
        origins=origins,
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            asyncio.get_running_loop().call_later(args.grace, service.cancel)
            end_within(args.grace + END_SECONDS)
            await super().shutdown(sockets)

    # uvicorn's own way, after some more seconds, is to break off the connections.
    config = uvicorn.Config(
        create_app(service),
        host=args.host,
        port=args.port,
        http=connections(limits),
        ws="none",
        timeout_graceful_shutdown=args.grace + 5,
    )
    Server(config).run()


if __name__ == "__main__":
    sys.exit(main())
