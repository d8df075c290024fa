"""`relay`, and `python -m cli`."""

import sys


def run() -> None:
    try:
        # Here, for it takes a while, in which a Ctrl-C is no fault either.
        from cli.main import app  # noqa: PLC0415

        app(prog_name="relay")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
