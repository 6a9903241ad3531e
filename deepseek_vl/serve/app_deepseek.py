"""The web page: `python deepseek_vl/serve/app_deepseek.py`, or `python -m deepseek_vl.serve.app_deepseek`.

Each browser tab has its own conversation. All share one engine per model.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek_vl.command_line import OneLineParser, run_command, starting
from deepseek_vl.kernels.memory import share_memory_between_threads
from deepseek_vl.serve.arguments import DEFAULT_MODEL, PAGE_DEFAULTS, add_arguments, open_engine, settings_of
from deepseek_vl.serve.listening import END_SECONDS, add_listening, check_port, end_within, names_of

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="app_deepseek.py", description="A web page to chat with DeepSeek-VL models.")
    add_arguments(parser, PAGE_DEFAULTS, action="append")
    add_listening(parser, 8122)
    parser.add_argument(
        "--root_path", default="", metavar="PATH",
        help="where a proxy has the page, if not at the top of its name: /chat for https://example.org/chat/",
    )  # fmt: skip
    parser.add_argument("--share", action="store_true", help="also through a public address of gradio.live")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for this name and password")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until told to stop; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    user, separator, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and separator and password):
        raise ValueError("--auth is a name and a password with a colon between them.")
    if args.root_path and re.fullmatch(r"(https?://[^\s/?#]+)?(/[^\s/?#]+)*/?", args.root_path) is None:
        raise ValueError(f"--root_path {args.root_path} is no path; it is one like /chat.")
    settings = settings_of(args)
    check_port(args.host, args.port)
    names = names_of(args.host, args.allowed_host)
    with starting():
        from deepseek_vl.serve.web.page import create_page, launch

    share_memory_between_threads()
    models = {}
    for path in dict.fromkeys(args.model_path or [DEFAULT_MODEL]):
        logger.info("Loading %s ...", path)
        # Users choose a directory by its name; they see its path only if two have the same name.
        name = Path(path).resolve().name if Path(path).is_dir() else path
        models[path if name in models else name] = open_engine(args, path)
    auth = (user, password) if args.auth else None
    # The name of the public address is not known before.
    names = None if args.share else names
    with _own_uploads():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: uploads are deleted
        page = create_page(models, settings)
        address = launch(
            page, args.host, args.port, auth, names, share=args.share, root_path=args.root_path.rstrip("/")
        )
        logger.info("The page is at %s; Ctrl-C ends it. %s", address, _advice(args))
        page.block_thread()
    end_within(END_SECONDS)


@contextlib.contextmanager
def _own_uploads() -> Iterator[None]:
    """Keep uploads in a directory of this server's own, unless `GRADIO_TEMP_DIR` names one.

    Gradio's own is shared by all servers of a user, and each deletes all of it when it ends.
    """
    with tempfile.TemporaryDirectory(prefix="deepseek_vl-page-") as directory:
        os.environ.setdefault("GRADIO_TEMP_DIR", directory)
        yield


def _advice(args: argparse.Namespace) -> str:
    """A sentence for the log about who can see the page."""
    if args.share:
        return "Whoever knows this address can use it; --auth asks for a password."
    if args.host in ("127.0.0.1", "localhost", "::1"):
        return "Only this machine sees it; --host 0.0.0.0 lets others, and --share gives it a public address."
    return "Others see it by this machine's name; --auth asks for a password."


if __name__ == "__main__":
    sys.exit(main())
