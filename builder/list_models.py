"""Write down which models transformers has, so that no worker looks for them: engine.answers.

python builder/list_models.py [--output FOLDER]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from engine.answers import keep_models  # noqa: E402 after the path is set
from engine.settings import IMAGE_KERNELS  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGE_KERNELS, help="default: kernels")
    print(keep_models(parser.parse_args(argv).output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
