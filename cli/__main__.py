"""`python -m cli` is `heft`: how a running stack starts its own parts with the same Python."""

from cli.main import app

if __name__ == "__main__":
    app()
