"""Caption cleaning, left padding, the two embedding caches and the tiny T5."""
import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset import encode_prompts
from models import text
from models.text import TextEncoder, clean_caption, left_pad, make_tiny_t5
from utils.config import one_line_errors

PROMPTS = ["a photo of a red star", "a photo of two circles", "a square left of a star", "circles"]
LENGTHS = [7, 6, 7, 2]  # tokens with </s>

CLEANED = [
    ("A Photo of <person> at the beach!", "a photo of person at the beach!"),
    ("see https://www.foo.com/bar.html now", "see html now"),
    ("mail me@foo.org twice", "mail me twice"),
    ("<b>bold</b> &amp; <i>it</i>", "bold it"),
    ("@nick_1 hello", "hello"),
    ("\u4e2d\u6587 cat \u65e5\u672c \u31ff\u3231\u4dc0", "cat"),
    ("a \u2013 b \u2014 c \u301c d", "a - b - c - d"),
    ("\u201cquoted\u201d text", '"quoted" text'),
    ("'all quoted'", "all quoted"),
    ("it\u2019s", "it's"),
    ("server 192.168.0.1 down", "server down"),
    ("time 7:35 <br/>", "time"),
    ("line\\nbreak", "line break"),
    ("#123 and #1234 and #12345", "and 1234 and"),
    ("id 1234567 ok 12345", "id ok 12345"),
    ("photo my-file.png here", "photo here"),
    ("wow...great . yes", "wow great yes"),
    ("***SALE*** (now)", "sale now"),
    ("this-is-my-cute-cat", "this is my cute cat"),
    ("two-part well-known", "two-part well-known"),
    ("jc6640 a", "a"),
    ("jc6640vc a", "a"),
    ("6640vc231 a", "a"),
    ("j2d1a2a w", "w"),
    ("worldwide free shipping shoes", "shoes"),
    ("free download free icon", "icon"),
    ("please click on here now", "please now"),
    ("png images of dogs", "of dogs"),
    ("apkallu statue", "allu statue"),
    ("page 12 of a book", "of a book"),
    ("poster 10x10 1000\u00d71000 5\u04457", "poster"),
    ("red : blue", "red: blue"),
    ("a,b.c 1.5", "a, b. c 1.5"),
    (",start end-", "start end"),
    (".hidden", ""),
    ("a%20cat+dog", "a cat dog"),
    ("caf\u00c3\u00a9", "caf\u00e3"),       # lower-casing comes before ftfy, so the mojibake is not mended
    ("&amp;amp;lt;b", "lt;b"),
    ("", ""),
]


@pytest.mark.parametrize("raw, cleaned", CLEANED)
def test_clean_caption(raw, cleaned):
    assert clean_caption(raw) == cleaned


def test_clean_caption_names_unreadable_html(monkeypatch):
    import bs4

    def reject(*args, **kwargs):
        raise bs4.ParserRejectedMarkup("no")
    monkeypatch.setattr(bs4, "BeautifulSoup", reject)  # which captions are rejected differs between Python versions
    with pytest.raises(ValueError, match=r"'<!\[x\[y\]\]>' is broken html"):
        clean_caption("<![x[y]]>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    make_tiny_t5(folder, PROMPTS)
    return folder


def encoder(folder, **options):
    return TextEncoder(folder, **{"max_length": 12, **options})


def count_rows(model) -> list[int]:
    """Rows of each forward from now on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


def test_left_pad_moves_rows_to_the_end_in_order():
    embeddings, mask = left_pad([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]], dtype=torch.bfloat16)], 3)
    assert embeddings.tolist() == [[[0], [1], [2]], [[0], [0], [3]]] and embeddings.dtype == torch.float32
    assert mask.tolist() == [[False, True, True], [False, False, True]]


def test_encode_equals_a_padded_forward_rolled_left(folder):
    enc = encoder(folder)
    embeddings, mask = enc.encode(PROMPTS)
    batch = enc.tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")
    hidden = enc.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert embeddings.shape == (4, 12, 64) and mask.sum(1).tolist() == LENGTHS
    for i, length in enumerate(LENGTHS):
        assert mask[i, -length:].all() and not embeddings[i, :-length].any()
        torch.testing.assert_close(embeddings[i, -length:], hidden[i, :length], atol=1e-5, rtol=0)


def test_a_prompt_is_encoded_once(folder, monkeypatch):
    enc = encoder(folder)
    seen = count_rows(enc.model)
    embeddings, _ = enc.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0], "A PHOTO of a red star"])
    assert sum(seen) == 2  # the last prompt cleans to the first
    assert torch.equal(embeddings[0], embeddings[2]) and torch.equal(embeddings[0], embeddings[3])
    enc.encode(PROMPTS[:2])
    assert sum(seen) == 2
    monkeypatch.setattr(text, "MEMORY_PROMPTS", 2)
    enc.encode([PROMPTS[0], PROMPTS[2]])   # pushes out PROMPTS[1], the least recently used
    enc.encode([PROMPTS[0]])
    assert sum(seen) == 3
    enc.encode([PROMPTS[1]])
    assert sum(seen) == 4


def test_a_prompt_does_not_depend_on_its_batch(folder):
    together = encoder(folder).encode(PROMPTS)[0]
    alone = torch.cat([encoder(folder).encode([prompt])[0] for prompt in PROMPTS])
    assert torch.equal(together, alone)
    padded = encoder(folder)
    padded.rows_per_forward = 3  # as on a GPU: several rows, padded to the longest
    seen = count_rows(padded.model)
    torch.testing.assert_close(padded.encode(PROMPTS)[0], alone, atol=1e-5, rtol=0)
    assert seen == [3, 1]


def test_empty_and_overlong_prompts(folder):
    enc = encoder(folder)
    embeddings, mask = enc.encode(["", "star " * 50])
    assert mask.sum(1).tolist() == [1, 12]
    assert enc.tokenizer("star " * 50, truncation=True, max_length=12)["input_ids"][-1] == 1
    assert embeddings[0, -1].any() and embeddings.isfinite().all()


def test_frozen(folder):
    enc = encoder(folder)
    assert not enc.model.training and not any(p.requires_grad for p in enc.model.parameters())
    assert not enc.encode(PROMPTS)[0].requires_grad
    assert encoder(folder, dtype=torch.bfloat16).encode(PROMPTS)[0].dtype == torch.float32


def test_without_cleaning_the_text_is_only_lower_cased(folder):
    assert encoder(folder, clean=False).prepare(" A (red) Star ") == "a (red) star"
    assert encoder(folder).prepare(" A (red) Star ") == "a red star"


def test_run_carries_gradients_for_pretraining(folder):
    enc = encoder(folder)
    enc.model.requires_grad_(True)
    left_pad(enc.run(PROMPTS), 12)[0].square().sum().backward()
    assert all(p.grad is not None for p in enc.model.parameters())
    assert not enc.encode(PROMPTS)[0].requires_grad


def write_cache(folder, tmp_path, *flags):
    prompts, cache = tmp_path / "prompts.txt", tmp_path / "cache.safetensors"
    prompts.write_text("\n".join([*PROMPTS[:3], PROMPTS[0].upper()]))
    encode_prompts.main(["--prompts", str(prompts), "--encoder", str(folder), "--output", str(cache),
                         "--max_length", "12", "--device", "cpu", *flags])
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_file_gives_back_the_same_bits(folder, tmp_path, capsys, dtype):
    cache = write_cache(folder, tmp_path, "--dtype", str(dtype).removeprefix("torch."))
    assert "wrote 3 distinct prompts of 4" in capsys.readouterr().out
    assert {row.dtype for row in load_file(cache).values()} == {dtype}
    enc = encoder(folder, dtype=dtype, cache_path=cache)
    cached = enc.encode(PROMPTS[:3])
    assert "_loaded" not in vars(enc), "T5 is not needed for cached prompts"
    live = encoder(folder, dtype=dtype).encode(PROMPTS[:3])
    assert torch.equal(cached[0], live[0]) and torch.equal(cached[1], live[1])
    seen = count_rows(enc.model)
    assert torch.equal(enc.encode(PROMPTS)[0], encoder(folder, dtype=dtype).encode(PROMPTS)[0])
    assert seen == [1]  # only the prompt that the file lacks


def test_the_width_is_known_without_loading_t5(folder, tmp_path, monkeypatch):
    cache = write_cache(folder, tmp_path)
    assert encoder(folder).width == 64
    monkeypatch.setattr("models.text._load_t5", lambda *args: pytest.fail("T5 was loaded"))
    assert encoder(folder, cache_path=cache).width == 64


def test_foreign_caches_are_refused(folder, tmp_path):
    cache = write_cache(folder, tmp_path)
    with pytest.raises(ValueError, match="max_length '12', this run needs '13'"):
        encoder(folder, max_length=13, cache_path=cache)
    with pytest.raises(ValueError, match="encoder 'tiny-t5', this run needs 'flan-t5-xl'"):
        TextEncoder(max_length=12, cache_path=cache)
    other = tmp_path / "retrained" / "tiny-t5"
    make_tiny_t5(other, PROMPTS, seed=1)
    with pytest.raises(ValueError, match="other weights"):
        encoder(other, cache_path=cache).encode(["not in the cache"])
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="has format None"):
        encoder(folder, cache_path=tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        encoder(folder, cache_path=tmp_path / "none.safetensors")
    cache.write_bytes(cache.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        encoder(folder, cache_path=cache)


def test_missing_encoder_says_what_to_fetch(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no text encoder at .*nowhere.*huggingface-cli download.*--t5_path"):
        TextEncoder(tmp_path / "nowhere")
    import transformers

    def unreachable(*args, **kwargs):
        raise OSError("no connection\nsecond line")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"google/flan-t5-xl cannot be loaded \(no connection\): fetch") as error:
        TextEncoder()
    assert "\n" not in str(error.value)


def test_damaged_encoders_are_refused(folder, tmp_path):
    make_tiny_t5(tmp_path / "a", PROMPTS)
    weights = tmp_path / "a" / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "wo" not in k}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="not a whole T5 encoder.*wo.weight"):
        TextEncoder(tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(tmp_path / "a")


def test_tiny_t5_is_small_seeded_and_encoder_only(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    assert not [name for name in state if "decoder" in name or "lm_head" in name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 400_000
    before = torch.random.get_rng_state()
    make_tiny_t5(tmp_path / "same", PROMPTS)
    assert torch.equal(before, torch.random.get_rng_state())
    again = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in again.items())
    tokenizer = encoder(folder).tokenizer
    assert tokenizer("RED zebra")["input_ids"][1:] == [2, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_cli_reports_bad_prompts_in_one_line(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        encode_prompts.main(["--prompts", str(tmp_path / "p.csv"), "--encoder", str(folder), "--output", "x"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
