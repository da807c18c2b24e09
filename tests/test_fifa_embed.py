from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_files import write_pairs
from tiny_pipelines import CORPUS, clip_tokenizer

from fifa.config import InputError
from fifa.embed import EMBEDDERS, Embedder, count_cut, embed, load_embedder
from fifa.embed.clip import ClipTextEmbedder, OpenClipEmbedder
from fifa.embed.network import NetworkEmbedder
from fifa.embed.sentence import SentenceEmbedder
from fifa.embed.tfidf import TfidfEmbedder
from fifa.scoring import ScoreConfig, read_manifest, score

PROMPTS = [
    "a red circle above a blue square",
    "a red circle over a blue square",
    "two green triangles on a grey background",
    "three yellow stars",
    "кошка сидит на окне",
    "!!!",
]


def distance(x: np.ndarray, i: int, j: int) -> float:
    return float(np.linalg.norm(x[i] - x[j]))


def test_rewordings_are_closer_than_other_subjects() -> None:
    x = embed(PROMPTS, TfidfEmbedder())
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    assert distance(x, 0, 1) < 0.8 * min(distance(x, 0, j) for j in (2, 3, 4, 5))


def test_vectors_are_the_same_every_time() -> None:
    prompts = [f"{colour} {shape} {i}" for i in range(60) for colour, shape in [("red", "star")]]
    assert np.array_equal(embed(prompts, TfidfEmbedder(16)), embed(prompts, TfidfEmbedder(16)))


@pytest.mark.parametrize("prompts", [["a"], ["?!"], ["a", "b"], ["", "a cat"]])
def test_few_and_odd_prompts_still_have_length_one(prompts: list[str]) -> None:
    x = embed(prompts, TfidfEmbedder())
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_a_prompt_that_shares_nothing_is_far_from_everything() -> None:
    prompts = [f"a red circle above {n} blue squares" for n in range(200)] + ["жёлтая звезда"]
    x = embed(prompts, TfidfEmbedder(64))
    distances = np.linalg.norm(x[:-1] - x[-1], axis=1)
    assert distances.min() > 1.0


def test_svd_keeps_the_geometry_of_tfidf() -> None:
    """With as many dimensions as prompts nothing is lost: inner products are those of TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = PROMPTS[:4]
    words = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    full = [m.fit_transform(texts).toarray() for m in (words, letters)]
    expected = sum(m @ m.T for m in full) / 2  # each part has rows of length one
    x = embed(texts, TfidfEmbedder())
    np.testing.assert_allclose(x @ x.T, expected, atol=1e-5)


class Counting:
    """Two-dimensional directions; counts how often it had to work."""

    name = "counting"
    calls = 0

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        angles = np.arange(len(prompts))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_cache_answers_for_the_same_prompts_in_the_same_company(tmp_path: Path) -> None:
    embedder = Counting()
    first = embed(["a", "b"], embedder, tmp_path)
    assert np.array_equal(embed(["a", "b"], embedder, tmp_path), first)
    assert embedder.calls == 1
    embed(["a", "b", "c"], embedder, tmp_path)
    embedder.name = "another"
    embed(["a", "b"], embedder, tmp_path)
    assert embedder.calls == 3


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    embed(["a"], Counting(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"embeddings-\w+\.npy is damaged"):
        embed(["a"], Counting(), tmp_path)


def test_an_embedder_must_return_unit_vectors() -> None:
    class Long(Counting):
        def __call__(self, prompts: Sequence[str]) -> np.ndarray:
            return 2 * super().__call__(prompts)

    with pytest.raises(InputError, match="unit vectors"):
        embed(["a", "b"], Long())


@pytest.mark.parametrize(
    ("spec", "arguments", "part"),
    [
        ("tfid", {}, "did you mean 'tfidf'"),
        ("tfidf:many", {}, "integer"),
        ("tfidf:0", {}, "at least 1"),
        ("tfidf", {"size": 3}, "unexpected keyword argument 'size'"),
        ("no.module:thing", {}, "cannot be loaded"),
        ("clip:ViT-B-32", {}, "is no open_clip model with weights"),
        ("clip:ViT-B-32:no-such-tag", {}, "clip:MODEL:TAG"),
        ("clip_hf:nowhere", {}, "no folder with config.json and no Hub id"),
        ("sentence:nowhere", {}, "no folder with modules.json and no Hub id"),
    ],
)
def test_an_embedder_that_is_not_there_is_one_sentence(
    spec: str, arguments: dict[str, object], part: str
) -> None:
    with pytest.raises(InputError, match=part) as error:
        load_embedder(spec, **arguments)
    assert "\n" not in str(error.value)


def test_code_from_outside_embeds() -> None:
    embedder = load_embedder(f"{__name__}:Counting")
    assert embed(["a", "b"], embedder).shape == (2, 2)


# ---- text networks: small ones of the same classes, saved and loaded back ------------------------

LONG = "a red circle above a blue square " * 30
TEXTS = [*CORPUS, "stars", "a red circle", LONG]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers CLIPModel, both towers, that reads 16 tokens."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {
        **small,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**small, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentenceTransformer: a BERT that reads 24 tokens, mean pooling, a prefix for every text."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentence")
    letters = "abcdefghijklmnopqrstuvwxyz:"
    words = sorted({word for line in CORPUS for word in line.split()} - set(letters))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *words, *letters, *(f"##{letter}" for letter in letters)]
    (bert / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        BertModel(config).save_pretrained(bert)
    BertTokenizerFast.from_pretrained(bert).save_pretrained(bert)
    model = SentenceTransformer(
        modules=[Transformer(str(bert), max_seq_length=24), Pooling(16)],
        prompts={"picture": "picture: "},
        default_prompt_name="picture",
        device="cpu",
    )
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the open_clip model `tiny-embed-test`, which reads 20 tokens."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    sizes = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-embed-test.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        torch.save(open_clip.create_model("tiny-embed-test").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


@pytest.fixture(params=["clip", "clip_hf", "sentence"])
def spec(request: pytest.FixtureRequest) -> str:
    """What names a small text network, of every class in turn."""
    if request.param == "clip":
        return f"clip:tiny-embed-test:{request.getfixturevalue('open_clip_file')}"
    folder = {"clip_hf": "clip_folder", "sentence": "sentence_folder"}[request.param]
    return f"{request.param}:{request.getfixturevalue(folder)}"


def test_every_text_network_of_the_table_is_tested() -> None:
    assert set(EMBEDDERS) == {"tfidf", "clip", "clip_hf", "sentence"}


def by_open_clip(spec: str) -> np.ndarray:
    import open_clip

    _, name, file = spec.split(":")
    model = open_clip.create_model(name, pretrained=file).eval()
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer(name)(TEXTS)
        return model.encode_text(tokens, normalize=True).numpy()


def by_transformers(spec: str) -> np.ndarray:
    """One text at a time, without padding, through the model with both towers."""
    from transformers import AutoTokenizer, CLIPModel

    folder = spec.partition(":")[2]
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        tokens = tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model.text_projection(model.text_model(**tokens).pooler_output)[0].numpy())
    return np.stack(rows)


def by_hand(spec: str) -> np.ndarray:
    """The mean over BERT's tokens of each text behind its prefix, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    folder = spec.partition(":")[2]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        tokens = tokenizer("picture: " + text, truncation=True, max_length=24, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**tokens).last_hidden_state[0].mean(0).numpy())
    return np.stack(rows)


ORIGINALS: dict[str, Callable[[str], np.ndarray]] = {
    "clip": by_open_clip,
    "clip_hf": by_transformers,
    "sentence": by_hand,
}


def test_vectors_are_those_of_the_original_code(spec: str) -> None:
    expected = ORIGINALS[spec.partition(":")[0]](spec)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = embed(TEXTS, load_embedder(spec, batch=4))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 0.01  # the network tells texts apart


def test_batches_and_company_do_not_matter(spec: str) -> None:
    whole = embed(TEXTS, load_embedder(spec, batch=6))
    np.testing.assert_allclose(embed(TEXTS, load_embedder(spec, batch=1)), whole, atol=1e-5)
    part = embed(TEXTS[::-2], load_embedder(spec))
    np.testing.assert_allclose(part, whole[::-2], atol=1e-5)


def test_half_precision_is_near(spec: str) -> None:
    full, half = (embed(TEXTS, load_embedder(spec, dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert 0 < np.abs(full - half).max() < 0.05
    assert load_embedder(spec, dtype="bf16").name != load_embedder(spec).name


def test_what_is_cut_is_counted(spec: str) -> None:
    embedder = load_embedder(spec)
    assert count_cut(TEXTS, embedder) == 1
    assert count_cut(TEXTS[:-1], embedder) == 0
    assert count_cut(TEXTS, TfidfEmbedder()) == 0


@pytest.mark.parametrize(
    ("arguments", "part"), [({"dtype": "fp8"}, "fp32 and bf16"), ({"batch": 0}, "at least 1")]
)
def test_a_wrong_setting_of_a_network_is_one_sentence(
    spec: str, arguments: dict[str, object], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        load_embedder(spec, **arguments)


def test_incomplete_and_damaged_weights_are_one_sentence(
    clip_folder: Path, open_clip_file: Path, sentence_folder: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    bare = shutil.copytree(clip_folder, tmp_path / "bare")
    weights = load_file(bare / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing.*text_projection"):
        embed(["a"], load_embedder(f"clip_hf:{bare}"))
    broken = shutil.copytree(sentence_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for spec in (f"sentence:{broken}", f"clip:tiny-embed-test:{tmp_path / 'junk.pt'}"):
        with pytest.raises(InputError, match="cannot be loaded"):
            embed(["a"], load_embedder(spec))


def test_offline_a_model_that_is_not_here_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for spec in ("clip_hf:someone/clip", "sentence:someone/model", "clip:someone/clip"):
        with pytest.raises(InputError, match=r"get it once by `hf download someone/\w+`"):
            load_embedder(spec)


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'd3po-fifa\[sentence\]'"):
        load_embedder("sentence:x")


# ---- vectors kept prompt by prompt ---------------------------------------------------------------


class Spelling(NetworkEmbedder):
    """Vectors from the letters of a text; remembers which texts it was asked for."""

    def __init__(self, batch: int = 2) -> None:
        self._set("spelling", "fp32", batch)
        self.asked: list[str] = []

    def _load(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        self.asked += prompts
        return torch.tensor([[len(p), 1.0, sum(map(ord, p))] for p in prompts])

    def count_cut(self, prompts: Sequence[str]) -> int:
        return 0


def test_a_grown_data_set_asks_for_its_new_prompts_only(tmp_path: Path) -> None:
    store = tmp_path / "shared" / "vectors.sqlite"
    first = embed(["b", "a", "π \0"], Spelling(), tmp_path / "1", store)
    grown = Spelling()
    x = embed(["new", "a", "b", "π \0"], grown, tmp_path / "2", store)
    assert grown.asked == ["new"]
    assert np.array_equal(x[[2, 1, 3]], first)
    assert np.array_equal(x, embed(["new", "a", "b", "π \0"], Spelling()))
    other = Spelling()
    other.name = "another"
    embed(["a", "b"], other, tmp_path / "3", store)
    assert sorted(other.asked) == ["a", "b"]


def test_a_killed_pass_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    prompts = ["aaaa", "b", "cc", "ddd", "eeeee"]

    class Killed(Spelling):
        def stream(self, prompts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
            for count, batch in enumerate(super().stream(prompts)):
                if count == 1:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        embed(prompts, Killed(), tmp_path)
    rest, heard = Spelling(), []
    embed(prompts, rest, tmp_path, told=lambda done, total: heard.append((done, total)))
    assert rest.asked == ["ddd", "cc", "b"]  # the longest two were kept
    assert heard == [(4, 5), (5, 5)]


def test_a_store_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "embeddings.sqlite").write_bytes(b"no database, but long enough to look at" * 40)
    with pytest.raises(InputError, match=r"embeddings\.sqlite: file is not a database"):
        embed(["a"], Spelling(), tmp_path)


def test_a_store_of_mixed_lengths_is_named(tmp_path: Path) -> None:
    embed(["a", "b"], Spelling(), tmp_path / "1", tmp_path / "v.sqlite")
    with sqlite3.connect(tmp_path / "v.sqlite") as db:
        db.execute("UPDATE vectors SET vector = x'00000000' WHERE prompt = 'a'")
    with pytest.raises(InputError, match="several lengths"):
        embed(["b", "a"], Spelling(), tmp_path / "2", tmp_path / "v.sqlite")


def test_a_scoring_pass_embeds_by_a_network_and_tells_what_was_cut(
    sentence_folder: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "a.parquet", 16)
    config = ScoreConfig(
        data=data,
        out=tmp_path / "s",
        reward="jpeg_incompressibility",
        embedder=f"sentence:{sentence_folder}",
        embedder_args={"batch": 4},
        embedding_store=tmp_path / "v.sqlite",
    )
    summary = score(config)
    manifest = read_manifest(tmp_path / "s")
    assert summary.cut == manifest["prompts"]["cut"] > 0
    assert manifest["prompts"]["embedder"] == load_embedder(config.embedder).name
    assert np.load(tmp_path / "s" / manifest["embeddings"]).shape == (summary.prompts, 16)
    with sqlite3.connect(tmp_path / "v.sqlite") as db:
        assert db.execute("SELECT count(*) FROM vectors").fetchone() == (summary.prompts,)


def test_classes_of_the_table_take_their_defaults_from_the_hub() -> None:
    """The names that users meet in the documents lead to these classes."""
    found: list[type[Embedder]] = [
        TfidfEmbedder,
        OpenClipEmbedder,
        ClipTextEmbedder,
        SentenceEmbedder,
    ]
    assert [f"{cls.__module__}:{cls.__name__}" for cls in found] == list(EMBEDDERS.values())
