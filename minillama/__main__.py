"""`python -m minillama VERB ...` does what `minillama VERB ...` does, without the console script."""
from minillama.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
