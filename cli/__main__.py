"""`relay`, and `python -m cli`."""

import sys


def run() -> None:
    try:
        from cli.main import app  # noqa: PLC0415 - a Ctrl-C while it loads is no fault either

        app(prog_name="relay")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # The disk is full to which it prints, the folder it is in is gone.
        sys.exit(f"relay: {error}")


if __name__ == "__main__":
    run()
