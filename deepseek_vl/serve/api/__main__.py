"""The command `python -m deepseek_vl.serve.api`."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from deepseek_vl.command_line import OneLineParser, add_compile, add_quantize, positive, run_command, starting
from deepseek_vl.engine.settings import GenerationSettings

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python -m deepseek_vl.serve.api", description="Serve a model over HTTP, as OpenAI does."
    )
    parser.add_argument("--model_path", required=True, help="checkpoint directory, or id on the Hugging Face Hub")
    parser.add_argument("--model_name", help="what clients call it (default: the end of the path)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s; 0 for any that is free)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32 (default: %(default)s)")
    add_quantize(parser)
    add_compile(parser)
    parser.add_argument("--max_batch", type=positive, default=16, help="answers at a time (default: %(default)s)")
    parser.add_argument("--max_waiting", type=positive, default=64, help="requests in line (default: %(default)s)")
    parser.add_argument(
        "--memory_mb", type=int, metavar="MB",
        help="for continuing earlier conversations (default: a quarter of the weights' size, at least 256; 0: none)",
    )  # fmt: skip
    parser.add_argument("--max_gen_len", type=positive, default=512, help="tokens per answer unless a request says")
    parser.add_argument("--temperature", type=float, default=0.2, help="unless a request says (default: %(default)s)")
    parser.add_argument(
        "--grace", type=positive, default=10, metavar="SECONDS",
        help="that running answers have to end when the server is told to stop (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--api_key", default=os.environ.get("DEEPSEEK_VL_API_KEY"),
        help="bearer key that clients must give (default: $DEEPSEEK_VL_API_KEY, or none)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-image-urls", nargs="*", metavar="DOMAIN", help="fetch images from public addresses, or these domains"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    settings = GenerationSettings(args.max_gen_len, args.temperature)

    with starting():
        import uvicorn

        from deepseek_vl.engine.compiled import compile_model
        from deepseek_vl.engine.engine import engine_of
        from deepseek_vl.serve.api.app import Limits, Service, create_app
        from deepseek_vl.serve.api.fetch import ImageFetcher
        from deepseek_vl.utils.io import load_pretrained_model

        logger.info("Loading %s ...", args.model_path)
        _, processor, model = load_pretrained_model(
            args.model_path, device=args.device, dtype=args.dtype, quantize=args.quantize
        )
    if args.compile:
        compile_model(model, processor)
    engine = engine_of(model)
    engine.max_rows = args.max_batch
    engine.memory_bytes = None if args.memory_mb is None else args.memory_mb << 20
    domains = tuple(domain.lower().strip(".") for domain in args.allow_image_urls or ())
    service = Service(
        name=args.model_name or os.path.basename(os.path.normpath(args.model_path)),  # noqa: PTH119  or a hub id
        model=model,
        processor=processor,
        settings=settings,
        key=args.api_key,
        limits=Limits(waiting=args.max_waiting),
        fetcher=ImageFetcher(args.allow_image_urls is not None, domains),
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            asyncio.get_running_loop().call_later(args.grace, engine.cancel)
            await super().shutdown(sockets)

    # uvicorn's own way, after some more seconds, is to break off the connections.
    config = uvicorn.Config(
        create_app(service), host=args.host, port=args.port, timeout_graceful_shutdown=args.grace + 5
    )
    Server(config).run()


if __name__ == "__main__":
    sys.exit(main())
