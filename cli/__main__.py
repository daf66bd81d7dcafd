"""`python -m cli` runs `heft`; `heft up` starts its processes so, with the same Python."""

from cli.main import app

if __name__ == "__main__":
    app()
