"""`python -m minillama VERB ...` does what `minillama VERB ...` does, without the console script."""
from minillama.cli import run

if __name__ == "__main__":
    run()
