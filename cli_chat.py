"""Chat with a DeepSeek-VL model in the terminal: `python cli_chat.py --help`."""

from deepseek_vl.serve.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
