"""The wheel is whole: `conf/` and the embedded model travel with it, and it trains from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_trains_from_an_empty_folder(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "jsae_lightning.train", "experiment=smoke", "data.train_tokens=4096"]
    done = subprocess.run(
        command,
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (site / "jsae_lightning" / "conf" / "train.yaml").is_file()
    (metrics,) = (tmp_path / "empty" / "logs" / "runs").glob("*/metrics.json")
    assert (metrics.parent / "sae_pair" / "model.safetensors").is_file()


def test_the_embedded_model_is_small_and_really_trained():
    """At most 4 MB in git; held-out cross-entropy at most half of the unigram entropy, as its script recorded."""
    import json

    from jsae_lightning.tiny_lm import WEIGHTS

    assert (WEIGHTS / "model.safetensors").stat().st_size <= 4_000_000
    figures = json.loads((WEIGHTS.parent / "figures.json").read_text())
    assert figures["held_out_cross_entropy"] <= 0.5 * figures["unigram_entropy"]


def test_the_recorded_cross_entropy_is_that_of_the_weights():
    """On 32 of the held-out sequences: within the noise of so few."""
    import json

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jsae_lightning.tiny_lm import WEIGHTS
    from jsae_lightning.tiny_lm.corpus import stdlib_documents

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    losses = []
    for _, text in list(stdlib_documents(held_out=True))[:32]:
        ids = torch.tensor([tokenizer(text[:1500])["input_ids"][:256]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    recorded = json.loads((WEIGHTS.parent / "figures.json").read_text())["held_out_cross_entropy"]
    assert abs(sum(losses) / len(losses) - recorded) < 0.5


def test_held_out_files_are_one_in_twenty_and_never_shared():
    from jsae_lightning.tiny_lm.corpus import stdlib_documents

    train, held_out = (dict(stdlib_documents(held_out=flag)) for flag in (False, True))
    assert not set(train) & set(held_out)
    assert not set(train.values()) & set(held_out.values())
    assert 0.03 < len(held_out) / len(train | held_out) < 0.07
