"""What programs that evaluate say while they work."""

import logging
import sys


def log_to_stdout(level: int) -> None:
    """Show what a program that evaluates has to say."""
    logging.basicConfig(level=level, format="[%(asctime)s][%(levelname)s] %(message)s", stream=sys.stdout)
    logging.getLogger("jsae_lightning.data").setLevel(logging.WARNING)  # it speaks of training
