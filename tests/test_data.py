import json
import shutil
import socket
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_factories import EOS, NumberTokenizer, data_settings, tagged_texts, tagged_tokens
from jsae_lightning import sequence_maker
from jsae_lightning.data import ActivationDataModule, make_data_config
from jsae_lightning.errors import UserError
from jsae_lightning.language_model import LanguageModel
from jsae_lightning.packing import Encoder
from jsae_lightning.tiny_lm import corpus
from jsae_lightning.token_sources import document_digest, is_held_out, open_source
from tiny_models import make_model_dir

D_MODEL = 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model_dir("gpt_neox", tmp_path_factory.mktemp("model"), d_model=D_MODEL, d_mlp=24, num_layers=2)


@pytest.fixture(scope="module")
def model_without_tokenizer(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("token*", "special*"))
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    """A cache of its own, no network, and no more tokens than asked for."""
    import datasets

    def refuse(*arguments, **_):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(sequence_maker, "_MIN_TOKENS_IN_MEMORY", 256)


@pytest.fixture
def number_tokenizer(monkeypatch):
    """The tokenizer of tagged texts, in place of the model's."""
    monkeypatch.setattr(sequence_maker, "load_tokenizer", lambda *_, **__: NumberTokenizer())


def make(model_dir, *, seed=0, num=10, rank_tokens=32, rank=0, world_size=1, trained_with=None, **changes):
    own = ActivationDataModule(
        model={"name_or_path": str(model_dir), "layer": 1},
        data=data_settings(batch_tokens=rank_tokens * world_size, **changes),
        seed=seed,
        num_batches=num,
        micro_batches=1,
        trained_with=trained_with,
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    own.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
    return own


def ready(model_dir, **changes):
    own = make(model_dir, **changes)
    own.setup("fit")
    return own


def write_text(folder, texts):
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return {"source": "text", "path": str(folder / "texts.txt"), "document_separator": "\n\n"}


def write_rows(folder, column, values, *, streaming=False, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return {"source": "jsonl", "path": str(folder / name), "streaming": streaming}


SOURCES = ["text", "table of texts", "table of tokens", "stream of texts", "stream of tokens"]


def tagged_source(folder, kind):
    """200 documents with tags 10 ... 209, from a source of this kind."""
    if kind == "text":
        return write_text(folder, tagged_texts(200))
    streaming = kind.startswith("stream")
    if kind.endswith("texts"):
        return write_rows(folder, "text", tagged_texts(200), streaming=streaming)
    return write_rows(folder, "input_ids", [tagged_tokens(n, 30 + n % 11) for n in range(200)], streaming=streaming)


# What is served


def test_batches_are_the_models_mlp_inputs(model_dir, tmp_path):
    own = ready(model_dir, **write_text(tmp_path, [f"text {n} about the cat and the dog" for n in range(100)]), num=4)
    loader = own.train_dataloader()
    block = torch.cat(list(loader))
    tokens = own._sequences.make_train().read(0, own.geometry.sequences, 0, 1)
    expected = LanguageModel.load(str(model_dir), layer=1).mlp_in(tokens).flatten(0, 1)
    assert len(loader) == 4 and block.shape == expected.shape == (128, D_MODEL)
    distances = torch.cdist(block, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-5 and sorted(distances.argmin(dim=1).tolist()) == list(range(128))
    assert own.frozen_mlp.d_model == D_MODEL and own.tokenizer.eos_token_id == 0


def test_stdlib_is_read_from_the_sources_of_python(model_dir, tmp_path, monkeypatch):
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "email", "logging", "http"):
        shutil.copytree(library / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(corpus, "stdlib_root", lambda: tmp_path)
    own = ready(model_dir, source="stdlib", context_length=None)
    assert own.val_tokens.shape == (4, 64)  # the model's context
    held_out = "".join(text for _, text in corpus.stdlib_documents(held_out=True))
    for sequence in own.val_tokens.tolist():
        for part in own.tokenizer.decode(sequence).split(own.tokenizer.eos_token):
            assert part in held_out
    assert len(list(own.train_dataloader())) == 10


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("kind", SOURCES)
def test_train_and_validation_share_no_document(model_dir, tmp_path, number_tokenizer, kind, repeat):
    settings = tagged_source(tmp_path, kind)
    own = ready(model_dir, **settings, num=120 if repeat else 40, repeat=repeat)
    assert own.val_tokens.shape == (4, 16)
    source = own._sequences.make_train()
    trained = set(source.read(0, own._needed_sequences(), 0, 1).flatten().tolist()) - {EOS}
    validated = set(own.val_tokens.flatten().tolist()) - {EOS}
    assert validated and not trained & validated
    if kind.startswith("table"):  # and nothing but held-out documents is missing
        everything = source.read(0, own._sequences.num, 0, 1)
        values = open_source(make_data_config(data_settings(**settings))).train.values()
        held_out = {10 + n for n, value in enumerate(values) if is_held_out(document_digest(value), 0.2)}
        assert set(range(10, 210)) - set(everything.flatten().tolist()) == held_out


@pytest.mark.parametrize("kind", SOURCES)
def test_validation_is_the_same_for_every_rank_and_seed(model_dir, tmp_path, number_tokenizer, kind):
    settings = tagged_source(tmp_path, kind)
    alone = ready(model_dir, **settings)
    other = ready(model_dir, **settings, seed=5, rank=1, world_size=2)
    assert alone.val_tokens.equal(other.val_tokens)
    batches = [list(own.train_dataloader()) for own in (alone, other)]
    assert len(batches[0]) == len(batches[1]) == 10 and not batches[0][0].equal(batches[1][0])


@pytest.mark.parametrize("kind", ["table of texts", "stream of tokens"])
def test_a_validation_split_is_used(model_dir, tmp_path, number_tokenizer, kind):
    column, values = ("text", tagged_texts(40)) if kind.endswith("texts") else ("tokens", [[7] * 20, [8] * 20] * 20)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", column, values, name="train.jsonl")
    validation = ["200 " * 40, "201 " * 40] if column == "text" else [[200] * 20, [201] * 40]
    write_rows(tmp_path / "data", column, validation, name="validation.jsonl")
    own = ready(
        model_dir,
        source="hub",
        name=str(tmp_path / "data"),
        val_split="validation",
        streaming=kind.startswith("stream"),
    )
    expected = [200] * 40 + [EOS] + [201] * 23 if column == "text" else [200] * 16 + [201] * 32
    assert own.val_tokens.flatten().tolist() == expected
    trained = set(own._sequences.make_train().read(0, 40, 0, 1).flatten().tolist())
    assert not trained & {200, 201}


def test_setup_twice_does_nothing(model_dir, tmp_path):
    own = ready(model_dir, **write_text(tmp_path, tagged_texts(100)))
    model = own.language_model
    own.setup("fit")
    assert own.language_model is model


def test_without_a_trainer_it_runs_alone_on_the_cpu(model_dir, tmp_path):
    own = make(model_dir, **write_text(tmp_path, tagged_texts(100)))
    own.trainer = None
    own.setup()
    assert own.language_model.device.type == "cpu" and len(list(own.train_dataloader())) == 10


def test_excluded_positions(model_dir, tmp_path, number_tokenizer):
    settings = tagged_source(tmp_path, "table of texts") | {
        "exclude_first_position": True,
        "exclude_special_tokens": True,
    }
    own = ready(model_dir, **settings)
    mask = own.included(own.val_tokens)
    assert not mask[:, 0].any() and not mask[own.val_tokens == EOS].any()
    assert mask[:, 1:][own.val_tokens[:, 1:] != EOS].all()
    assert own.geometry.sequences > 128 / 15  # a margin for the special tokens


# Amounts


def test_memory_sources_tokenise_no_more_documents_than_needed(model_dir, tmp_path, monkeypatch):
    settings = write_text(tmp_path, [f"text {n} about the cat and the dog, again and again" for n in range(1000)])
    encoded = []
    original = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, values: encoded.extend(values) or original(self, values))
    own = ready(model_dir, **settings, train_tokens=320)
    assert 30 < len(encoded) < 400 and "as many documents as training needs" in own.describe()
    small = own._sequences.num
    # A little more to train on leaves the data, and with them a resumed run, as they were.
    more = ready(model_dir, **settings, train_tokens=400, num=12)
    assert more.train_dataloader().state_dict()["fingerprint"] == own.train_dataloader().state_dict()["fingerprint"]
    # Blocks and ranks that read more than the tokens asked for are given more documents before they must repeat.
    eight = ready(model_dir, **settings, train_tokens=320, repeat=False, world_size=8)
    assert eight._sequences.num > small and eight._sequences.num >= eight._needed_sequences()


def test_describe(model_dir, tmp_path, number_tokenizer):
    own = ready(model_dir, **tagged_source(tmp_path, "table of texts"), num=200, val_sequences=10_000)
    data, buffer = own.describe().splitlines()
    num = own._sequences.num
    assert f"{num:,} sequences of 16 tokens" in data and "bos=never" in data
    assert f"training takes 0.01 M tokens in {400 / num:.2f} epochs" in data
    assert f"validation on {len(own.val_tokens)} sequences (10000 asked for, no more are held out)" in data
    assert buffer == (
        "activation buffer: 4 batches of 32 tokens = 128 tokens of 8 sequences, shuffled in 8 shards; "
        "0.0 MB on each of 1 rank(s)"
    )


def test_the_buffer_is_stated_in_megabytes(model_dir, tmp_path):
    own = ready(model_dir, **write_text(tmp_path, tagged_texts(100)), rank_tokens=4096, buffer_batches=32)
    assert (
        f"131,072 tokens of 8,192 sequences, shuffled in 8 shards; {131072 * D_MODEL * 4 / 1e6:.1f} MB"
        in own.describe()
    )


def test_describe_a_stream(model_dir, tmp_path, number_tokenizer):
    own = ready(model_dir, **tagged_source(tmp_path, "stream of texts"))
    assert "a stream, in its own order, its first 2 rows held out" in own.describe()


def test_too_little_data_without_repeat(model_dir, tmp_path, number_tokenizer):
    settings = tagged_source(tmp_path, "table of texts") | {"repeat": False, "train_tokens": 32_000}
    with pytest.raises(
        UserError, match=r"data.train_tokens: 32,000 tokens take .* lower data.train_tokens to [\d,]+$"
    ) as e:
        ready(model_dir, **settings, num=1000)
    possible = int(str(e.value).split()[-1].replace(",", ""))
    assert 4000 < possible < 8000
    ready(model_dir, **settings | {"train_tokens": possible}, num=possible // 32)


def test_a_stream_that_ends_too_early(model_dir, tmp_path, number_tokenizer):
    own = ready(model_dir, **tagged_source(tmp_path, "stream of texts"), repeat=False, num=300)
    with pytest.raises(UserError, match="data.repeat: false, but .* ends after .* sequences .* reads whole blocks of"):
        list(own.train_dataloader())


@pytest.mark.parametrize("length", [8, 16, 24, 40])
def test_of_a_stream_no_more_rows_are_judged_than_training_held_out(model_dir, tmp_path, length):
    """Rows are cut to whole sequences: counted in tokens, sequences of another length would take more rows."""
    source = write_rows(tmp_path, "input_ids", [tagged_tokens(n, 40) for n in range(200)], streaming=True)
    trained = {"context_length": 16, "bos": "auto", "val_sequences": 8}  # two of each row
    own = ready(model_dir, **source, context_length=length, val_sequences=50, trained_with=trained)
    assert set(own.val_tokens.flatten().tolist()) == {10, 11, 12, 13} and len(own.val_tokens) == 4 * (40 // length)
    training = ready(model_dir, **source, val_sequences=8)
    assert set(training.val_tokens.flatten().tolist()) == {10, 11, 12, 13}


def test_a_sequence_longer_than_the_held_out_rows_is_refused(model_dir, tmp_path):
    source = write_rows(tmp_path, "input_ids", [tagged_tokens(n, 20) for n in range(200)], streaming=True)
    trained = data_settings(**source, val_sequences=2)
    with pytest.raises(UserError, match="data.context_length: 64, but none of the rows that training held out"):
        ready(model_dir, **source, context_length=64, trained_with=trained)


# Mistakes, found before the language model is loaded


@pytest.mark.parametrize(
    ("kind", "values", "changes", "message"),
    [
        (
            "texts",
            ["5 6"] * 3,
            {"val_fraction": 0.0},
            "data.context_length: 16, but the training documents .* hold only 9 tok",
        ),
        (
            "texts",
            ["5 6 7 8"] * 30,
            {"val_fraction": 0.0},
            "data.val_fraction: 0.0 leaves not one sequence of 16 tokens",
        ),
        ("stream", ["5 6"] * 3, {}, "data.val_sequences: 4 sequences .* not one is left to train on"),
        ("texts", ["5 6"] * 30, {"context_length": 65}, "data.context_length: 65 is more than the model's 64"),
        ("tokens", [[5, 288]] * 30, {}, "token id 288, but the model's vocabulary ends at 287"),
        ("token stream", [[5, -1]] * 30, {}, "token id -1, but the model's vocabulary ends at 287"),
        ("texts", ["5"] * 30, {"text_column": "body"}, "data.text_column: no column 'body' .* columns found: text"),
        ("texts", ["5"] * 30, {"path": "/nowhere/x"}, "data.path: there is no file"),
    ],
)
def test_mistakes(model_dir, tmp_path, number_tokenizer, monkeypatch, kind, values, changes, message):
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the language model was loaded"))
    column = "input_ids" if "token" in kind else "text"
    settings = write_rows(tmp_path, column, values, streaming="stream" in kind)
    with pytest.raises(UserError, match=message) as raised:
        ready(model_dir, **settings | changes)
    assert "\n" not in str(raised.value)


def test_one_text_without_a_separator_cannot_be_split(model_dir, tmp_path):
    settings = write_text(tmp_path, tagged_texts(100)) | {"document_separator": None, "val_fraction": 0.01}
    with pytest.raises(UserError, match=r"data.val_fraction: 0.01 .*\(data.document_separator splits text files"):
        ready(model_dir, **settings)


def test_vocabulary_is_checked_beyond_the_first_rows(model_dir, tmp_path):
    values = [tagged_tokens(n % 50, 16) for n in range(600)]
    values[500] = [288] * 16
    own = ready(model_dir, **write_rows(tmp_path, "tokens", values, streaming=True), num=300)
    with pytest.raises(UserError, match="token id 288"):
        list(own.train_dataloader())


@pytest.mark.parametrize(
    ("change", "message"), [({"sourc": "x"}, "data.sourc: there is no such key"), (None, "data.repeat: is miss")]
)
def test_keys_of_the_settings(model_dir, change, message):
    settings = data_settings(**change or {})
    if change is None:
        del settings["repeat"]
    with pytest.raises(UserError, match=message):
        ActivationDataModule(
            model={"name_or_path": str(model_dir), "layer": 0},
            data=settings,
            seed=0,
            num_batches=1,
            micro_batches=1,
        )


# Tokenizers and caches


def test_tokens_need_no_tokenizer_but_texts_do(model_without_tokenizer, tmp_path):
    own = ready(model_without_tokenizer, **write_rows(tmp_path, "tokens", [tagged_tokens(n, 20) for n in range(100)]))
    assert own.tokenizer is None and len(list(own.train_dataloader())) == 10
    with pytest.raises(UserError, match="tokenizer"):
        ready(model_without_tokenizer, **write_rows(tmp_path, "text", tagged_texts(100)))


def test_prepare_data_leaves_nothing_to_tokenise(model_dir, tmp_path, monkeypatch):
    settings = write_rows(tmp_path, "text", tagged_texts(200))
    first = make(model_dir, **settings)
    first.prepare_data()
    encoded = []
    original = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, values: encoded.extend(values) or original(self, values))
    ready(model_dir, **settings, rank=1, world_size=2)
    assert len(encoded) == 64  # the first rows, that are looked at every time


# Resume through Lightning


class Recorder:
    """Makes a LightningModule that records its batches."""

    def __new__(cls, batches):
        from lightning import LightningModule

        class Module(LightningModule):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(()))

            def training_step(self, batch, batch_idx):
                batches.append(batch.clone())
                return self.weight * batch.mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Module()


@pytest.mark.parametrize("kind", ["table of tokens", "stream of texts"])
@pytest.mark.parametrize("stop", [3, 4])
def test_lightning_resumes_at_the_next_batch(model_dir, tmp_path, number_tokenizer, kind, stop):
    from lightning import Trainer

    settings = tagged_source(tmp_path, kind)

    def run(steps, checkpoint=None):
        batches = []
        own = make(model_dir, **settings, num=10)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Recorder(batches), datamodule=own, ckpt_path=checkpoint)
        return trainer, batches

    _, expected = run(10)
    trainer, first = run(stop)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert not any(
        "language_model" in key or "embed" in key for key in torch.load(tmp_path / "stopped.ckpt")["state_dict"]
    )
    _, rest = run(10, tmp_path / "stopped.ckpt")
    assert len(expected) == 10 and len(first) == stop and len(rest) == 10 - stop
    assert torch.stack(first + rest).equal(torch.stack(expected))


# Documents of held-out positions


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("val_sequences", [4, 10_000])
def test_documents_of_held_out_positions(model_dir, tmp_path, number_tokenizer, kind, val_sequences):
    """No text's document has two tags; all held-out texts, where they are read in a row, are one document each."""
    if kind.startswith("stream") and val_sequences > 4:
        val_sequences = 20  # of a stream, more would leave nothing to train on
    own = ready(model_dir, **tagged_source(tmp_path, kind), val_sequences=val_sequences)
    tokens, documents = own.val_tokens, own.val_documents()
    assert documents.shape == tokens.shape
    text = tokens != EOS
    pairs = set(zip(documents[text].tolist(), tokens[text].tolist(), strict=True))
    assert len(pairs) == len({document for document, _ in pairs}) or kind.endswith("tokens")
    assert (documents.flatten().diff() >= 0).all() and documents[0, 0] == 0
    is_all = val_sequences == 10_000 or kind.startswith("stream")
    if is_all and kind.endswith("texts"):
        assert len(pairs) == len({tag for _, tag in pairs}) > 1
    elif kind != "text":  # spaced out, or rows of tokens: each sequence begins a document
        assert (documents[1:, 0] > documents[:-1, -1]).all()


def test_sequences_cut_from_rows_begin_a_document_each(model_dir, tmp_path, number_tokenizer):
    write_rows(tmp_path, "tokens", [[10 + index] * (20 + index) for index in range(200)])
    own = ready(model_dir, source="jsonl", path=str(tmp_path / "rows.jsonl"), streaming=True, val_sequences=5)
    assert own.val_documents()[:, 0].tolist() == [0, 1, 2, 3, 4]
