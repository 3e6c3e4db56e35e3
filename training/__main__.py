"""Train one run: `python -m hybrid_sleep.training CONFIG [key=value ...] [--resume]`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if trained, 2 for bad input, 130 if interrupted (with a checkpoint)."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_sleep.training", description=__doc__)
    parser.add_argument("config", help="the YAML file of a run, such as configs/runs/*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    given = parser.parse_intermixed_args(arguments)
    # The config is checked before torch and transformers take their seconds to load.
    from hybrid_sleep.training.config import load_run_config

    try:
        run = load_run_config(given.config, given.overrides)
        from hybrid_sleep.training.run import train

        result = train(
            run, resume=given.resume, overwrite=given.overwrite, progress=not given.quiet
        )
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt or 'nothing more was written'}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"trained {result.steps} steps in {result.seconds:.0f} s; model in {result.model_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
