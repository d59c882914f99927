"""TensorBoard event files that a resumed run continues without repeating a step.

Steps are completed optimizer steps, counted from 1; step 0 holds what is logged once: the configuration and the
hyper-parameters.
"""

import struct
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from jsae_lightning.atomic_files import atomic_file

HPARAM_METRICS = (
    "val/explained_variance_input",
    "val/explained_variance_output",
    "val/ce_score_both",
    "jacobian/effective_edges",
    "jacobian/share_above_0.01",
)
"""The columns of TensorBoard's HPARAMS tab; it shows the last value logged under each of these tags."""

_CONFIG_TAG = "config"
_TEXT_SUFFIX = "/text_summary"  # torch's writer appends it to every text tag


class ResumableTensorBoardLogger(TensorBoardLogger):
    """Event files directly in `save_dir`: scalars, configuration, the HPARAMS tab, images and histograms."""

    def __init__(self, save_dir: str | Path) -> None:
        """Write to the folder `save_dir`, which is made when something is logged first."""
        super().__init__(save_dir=str(save_dir), name="", version="", default_hp_metric=False)
        self._once: set[str] | None = None  # tags of what is logged once that are in the files
        self._ended = False

    @rank_zero_only
    def log_config(self, text: str) -> None:
        """Log the configuration, `text` in YAML, under TEXT; do nothing if the folder has one."""
        if _CONFIG_TAG + _TEXT_SUFFIX not in self._logged_once():
            self.experiment.add_text(_CONFIG_TAG, f"```yaml\n{text.rstrip()}\n```", 0)
            self._logged_once().add(_CONFIG_TAG + _TEXT_SUFFIX)
            self.flush()

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Fill the HPARAMS tab: `params`, nested or flat, and the tags of `metrics` (None: `HPARAM_METRICS`).

        The tab shows the last value logged under each tag, so the values of `metrics` are not used and no placeholder
        ends up in a curve. Does nothing if the folder has hyper-parameters already.
        """
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from torch.utils.tensorboard.summary import hparams

        if SESSION_START_INFO_TAG in self._logged_once():
            return
        flat = _flat_primitives(vars(params) if isinstance(params, Namespace) else params)
        experiment, session_start, _ = hparams(flat, dict.fromkeys(metrics or HPARAM_METRICS, 0.0))
        writer = self.experiment._get_file_writer()
        writer.add_summary(experiment, 0)
        writer.add_summary(session_start, 0)
        self._logged_once().add(SESSION_START_INFO_TAG)
        self.flush()

    @rank_zero_only
    def log_histogram_counts(self, tag: str, counts: Any, edges: Any, step: int) -> None:
        """Log a histogram from its bins: `counts` (num_bins,) >= 0 and ascending `edges` (num_bins + 1,).

        Where all counts are 0 nothing is logged.
        """
        counts = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
        edges = torch.as_tensor(edges, dtype=torch.float64, device="cpu")
        filled = counts.nonzero()[:, 0]
        if len(filled) == 0:
            return
        first, last = int(filled[0]), int(filled[-1])
        centres = (edges[:-1] + edges[1:]) / 2
        self.experiment.add_histogram_raw(
            tag,
            min=float(edges[first]),
            max=float(edges[last + 1]),
            num=float(counts.sum()),
            sum=float(counts @ centres),
            sum_squares=float(counts @ centres.square()),
            bucket_limits=edges[first + 1 : last + 2].tolist(),
            bucket_counts=counts[first : last + 1].tolist(),
            global_step=step,
        )

    @rank_zero_only
    def log_image(self, tag: str, png: bytes, step: int) -> None:
        """Log an image that is a PNG file already."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, always the first
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.experiment._get_file_writer().add_summary(summary, step)

    @rank_zero_only
    def flush(self) -> None:
        """Bring everything logged so far to the event file."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """The same as `flush`; Lightning's own writes a file of hyper-parameters besides."""
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Note in the HPARAMS tab how the run ended, and close the event file."""
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from torch.utils.tensorboard.summary import hparams

        if self._experiment is None:
            return
        if not self._ended and status == "success" and SESSION_START_INFO_TAG in self._logged_once():
            self._ended = True
            session_end = hparams({}, {})[2]
            self._experiment._get_file_writer().add_summary(session_end, 0)
        self._experiment.close()

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Remove from the event files every event of a step > `step`, and the note of how the run ended.

        A record that a kill has cut short is dropped. A file that is left with nothing is removed.
        """
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None
        for path in self._event_files():
            _truncate_event_file(path, step)
        self._once, self._ended = None, False

    def _logged_once(self) -> set[str]:
        """Return the tags of step 0 in the event files. They come first, so that reading stops early."""
        if self._once is None:
            self._once = set()
            for path in self._event_files():
                for event, _ in _read_events(path):
                    if event.step > 0:
                        break
                    self._once |= {value.tag for value in event.summary.value}
        return self._once

    def _event_files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))


def _truncate_event_file(path: Path, step: int) -> None:
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
    from tensorboard.summary.writer.record_writer import RecordWriter

    # Not beside `path` under a name made from it: TensorBoard reads every file with "tfevents" in its name, and a kill
    # may leave this one behind.
    truncated = path.with_name("truncated_events")
    has_summaries = False
    with atomic_file(truncated) as temporary, temporary.open("wb") as file:
        writer = RecordWriter(file)
        for event, record in _read_events(path):
            tags = {value.tag for value in event.summary.value}
            if event.step <= step and SESSION_END_INFO_TAG not in tags:
                writer.write(record)
                has_summaries = has_summaries or bool(tags)
    truncated.replace(path)
    if not has_summaries:
        path.unlink()


def _read_events(path: Path) -> Iterator[tuple[Any, bytes]]:
    """Yield each event of a file and its record, up to the first record that is incomplete or damaged."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for record in RawEventFileLoader(str(path)).Load():
        yield Event.FromString(record), record


def _flat_primitives(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys by dots, as on the command line; leave out None, turn lists and booleans into text."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat_primitives(value, f"{prefix}{key}.")
        elif value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[f"{prefix}{key}"] = value if is_number else str(value)
    return flat
