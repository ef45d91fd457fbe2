"""Captions -> T5 embeddings as LlamaGen's t2i models read them: cleaned, frozen, left-padded with zeros.

`clean_caption` is LlamaGen's cleaning (DeepFloyd IF's, run twice); the models were trained on its output, oddities
included. `TextEncoder` runs any T5 encoder that transformers can load, a hub id or a local folder; `make_tiny_t5`
writes a small one for the shapes world and for tests. Reading prompt files is not done here: dataset/prompts.py;
filling an embedding cache for a whole file is dataset/encode_prompts.py.

Shapes: N prompts, T = max_length slots, t <= T tokens of one prompt, C embedding width.
"""
import hashlib
import html
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote_plus

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.files import one_line

MEMORY_PROMPTS = 1024  # prompts kept in memory: about 100 MB for flan-t5-xl in bf16 at 25 tokens a prompt
GPU_ROWS = 64          # prompts per forward on a GPU
CACHE_FORMAT = "text embeddings 1"

# --- cleaning: rows run in this order; later rows rely on what earlier ones left behind ---------------------------

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32"
           r"\ufe58\ufe63\uff0d]+")


def _compile(*rows: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rows]


_BEFORE_HTML = _compile(
    (r"<person>", "person"),                                         # else the html step would drop the word
    (rf"\b((?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),    # the scheme of a url, or a bare domain with path
    (rf"\b((?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),       # the same after "www:"
)
_AFTER_HTML = _compile(
    (r"@[\w\d]+\b", ""),                                             # @nickname
    (r"[\u31c0-\u9fff]+", ""),                                       # CJK: strokes through unified ideographs
    (_DASHES, "-"),                                                  # runs of any dash
    (r"[`´«»“”¨]", '"'),                                             # double quotes
    (r"[‘’]", "'"),                                                  # single quotes
    (r"&quot;?", ""),                                                # quote entity that survived the html step
    (r"&amp", ""),                                                   # ampersand entity, likewise
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),                    # ip address
    (r"\d:\d\d\s+$", ""),                                            # article id at the end, as in "7:35 "
    (r"\\n", " "),                                                   # a newline written as two characters
    (r"#\d{1,3}\b", ""),                                             # "#123"
    (r"#\d{5,}\b", ""),                                              # "#12345" and longer: four digits stay
    (r"\b\d{6,}\b", ""),                                             # long bare number
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),                              # file name
    (r"[\"\']{2,}", '"'),                                            # repeated quotes
    (r"[\.]{2,}", " "),                                              # repeated dots
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),                       # ornaments and brackets
    (r"\s+\.\s+", " "),                                              # a dot standing alone
)
_JOINERS = re.compile(r"[-_]")
_MAX_JOINERS = 3                                                     # more than these: "this-is-my-cute-cat"
_AFTER_FTFY = _compile(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),                              # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),                              # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),                                    # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),                      # shop talk
    (r"(free\s)?download(\sfree)?", ""),                             # likewise
    (r"\bclick\b\s(?:for|on)\s\w+", ""),                             # likewise
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),                     # "png images", also a word's first letters
    (r"\bpage\s+\d+\b", ""),                                         # page number
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),            # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),                  # 10x10 with a Latin, Cyrillic or multiply sign
    (r"\b\s+\:\s+", ": "),                                           # a colon that floats
    (r"(\D[,\./])\b", r"\1 "),                                       # a space after punctuation
    (r"\s+", " "),                                                   # white space made plain; not yet stripped here
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),                             # quotes round the whole
    (r"^[\'_,\-:;]", ""),                                            # leading punctuation
    (r"[\'_,\-:+]$", ""),                                            # trailing punctuation
    (r"^\.\S+$", ""),                                                # one word that begins with a dot
)


def clean_caption(text: str) -> str:
    """Twice, because the first pass can uncover what only the second removes."""
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    import ftfy  # here, not above: class-to-image runs import this module's neighbours and need neither package

    text = _substitute(unquote_plus(text).strip().lower(), _BEFORE_HTML)
    text = _substitute(_strip_html(text), _AFTER_HTML)
    if len(_JOINERS.findall(text)) > _MAX_JOINERS:
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _substitute(text, _AFTER_FTFY).strip()


def _substitute(text: str, rows: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rows:
        text = pattern.sub(replacement, text)
    return text


def _strip_html(text: str) -> str:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption may look like a file name
        try:
            return BeautifulSoup(text, features="html.parser").text
        except ParserRejectedMarkup:
            raise ValueError(f"caption {text!r} is broken html: remove its '<![' or turn cleaning off") from None


# --- the encoder ---------------------------------------------------------------------------------------------------


def left_pad(rows: list[Tensor], max_length: int) -> tuple[Tensor, Tensor]:
    """Ragged rows [t, C] -> (embeddings float32 [N, T, C], mask bool [N, T]): tokens in order at the END, zeros before.

    LlamaGen's first image token stands right behind the last caption slot, so that slot must hold a real token.
    """
    assert rows, "left_pad needs at least one row"
    embeddings = torch.zeros(len(rows), max_length, rows[0].shape[-1], device=rows[0].device)  # [N, T, C]
    mask = torch.zeros(len(rows), max_length, dtype=torch.bool, device=rows[0].device)         # [N, T]
    for i, row in enumerate(rows):
        embeddings[i, max_length - len(row):] = row.float()
        mask[i, max_length - len(row):] = True
    return embeddings, mask


class TextEncoder:
    """A frozen T5 encoder with two caches: recent prompts in memory, and optionally a file of a whole prompt set.

    Not an nn.Module, so that a policy holding it neither trains nor saves it. With a cache file T5 itself is loaded
    only when a prompt is missing from the file; touch `.model` to load it at once.
    Rows are kept in the dtype the model computed in and cast to float32 on the way out, so a cached row equals the
    row that was stored bit for bit. dtype None: bfloat16 on a GPU, as LlamaGen, else float32.
    `offload`: the model is on `device` only while it encodes.
    """

    offload = False

    def __init__(self, name_or_path: str = "google/flan-t5-xl", max_length: int = 120, device: str = "cpu",
                 dtype: torch.dtype | None = None, clean: bool = True, cache_path: str | Path | None = None):
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.name_or_path, self.max_length, self.clean = str(name_or_path), max_length, clean
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        # On a CPU one prompt per forward: no time goes into padding, and its embedding has the same bits whatever
        # its batch, which a bit-exact resume needs (the memory starts empty then, so batches differ).
        self.rows_per_forward = GPU_ROWS if self.device.type == "cuda" else 1
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._file = _open_cache(Path(cache_path), self._identity) if cache_path else None
        self._file_keys = set(self._file.keys()) if self._file else set()
        if self._file is None:
            assert self._loaded, "T5 is loaded at once: there is no file to take rows from"

    @property
    def model(self) -> torch.nn.Module:
        return self._loaded[1]

    @property
    def tokenizer(self):
        return self._loaded[0]

    @property
    def width(self) -> int:
        """C; with a cache file T5 isn't loaded for it."""
        if self._file_keys:
            return self._file.get_slice(next(iter(self._file_keys))).get_shape()[-1]
        return self.model.config.d_model

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Raw prompts -> (embeddings float32 [N, T, C], mask bool [N, T]), see `left_pad`."""
        texts = [self.prepare(prompt) for prompt in prompts]
        rows = self.rows(texts)
        return left_pad([rows[text] for text in texts], self.max_length)

    def prepare(self, prompt: str) -> str:
        """The text that T5 reads; without cleaning LlamaGen still lower-cases."""
        return clean_caption(prompt) if self.clean else prompt.lower().strip()

    def rows(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Prepared texts -> {text: its valid embeddings [t, C]}; every distinct text is encoded at most once."""
        texts = list(dict.fromkeys(texts))
        found = {text: self._memory[text] for text in texts if text in self._memory}
        for text in texts:
            if text not in found and _key(text) in self._file_keys:
                found[text] = self._file.get_tensor(_key(text)).to(self.device)
        missing = [text for text in texts if text not in found]
        with torch.no_grad():  # not inference_mode: the embeddings enter the policy's backward
            found |= zip(missing, self.run(missing))
        if missing and self.offload:
            self.model.to("cpu")
        for text in texts:
            self._memory[text] = found[text]
            self._memory.move_to_end(text)
        while len(self._memory) > MEMORY_PROMPTS:
            self._memory.popitem(last=False)
        return found

    def run(self, texts: list[str]) -> list[Tensor]:
        """Prepared texts -> ragged rows [t, C] straight from the model, with gradients where they are enabled."""
        rows = []
        if texts and self.offload:
            self.model.to(self.device)
        for start in range(0, len(texts), self.rows_per_forward):
            chunk = texts[start:start + self.rows_per_forward]
            ids = [torch.tensor(row) for row in self.tokenizer(chunk, truncation=True, max_length=self.max_length,
                                                               verbose=False)["input_ids"]]
            lengths = [len(row) for row in ids]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # [rows, longest]; 0 is T5's <pad>
            hidden = self.model(input_ids=ids.to(self.device),
                                attention_mask=mask.to(self.device)).last_hidden_state  # [rows, longest, C]
            rows += [hidden[i, :length].clone() for i, length in enumerate(lengths)]    # a view would keep the padding
        return rows

    def save_cache(self, path: str | Path, rows: dict[str, Tensor]) -> None:
        """Write {prepared text: row [t, C]} as a cache file that `cache_path` reads; whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        metadata = self._identity | {"weights": _fingerprint(self.model)}
        try:
            save_file({_key(text): row.cpu().contiguous() for text, row in rows.items()}, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def _identity(self) -> dict[str, str]:
        # the last part of the name: google/flan-t5-xl and /data/flan-t5-xl hold the same encoder
        name = Path(self.name_or_path)
        return {"format": CACHE_FORMAT, "encoder": (name.resolve() if name.is_dir() else name).name,
                "max_length": str(self.max_length)}

    @cached_property
    def _loaded(self) -> tuple:
        tokenizer, model = _load_t5(self.name_or_path, self.dtype)
        if self._file and self._file.metadata()["weights"] != _fingerprint(model):
            raise ValueError(f"the text cache was made by other weights than {self.name_or_path} holds now: make it "
                             "again with `python -m dataset.encode_prompts`")
        return tokenizer, model.to(self.device)


def _load_t5(name_or_path: str, dtype: torch.dtype) -> tuple:
    from transformers import AutoTokenizer, T5EncoderModel  # seconds to import

    # a hub id has at most one slash; asking the hub for a path would only delay the error by its retries
    is_local = Path(name_or_path).exists() or name_or_path.startswith((".", "/")) or name_or_path.count("/") > 1
    mend = "fetch one with `huggingface-cli download google/flan-t5-xl --local-dir DIR` and give DIR as --t5_path"
    if is_local and not (Path(name_or_path) / "config.json").is_file():
        raise ValueError(f"no text encoder at {name_or_path} (a folder of config.json, weights, tokenizer): {mend}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        # the attention in so many words: a config.json can name compiled code on the hub in its place
        model, info = T5EncoderModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True,
                                                     attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, SafetensorError,
            pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the text encoder {name_or_path} cannot be loaded ({reason}): {mend}") from error
    if info["missing_keys"]:  # transformers would leave them random
        raise ValueError(f"{name_or_path} is not a whole T5 encoder, it lacks {sorted(info['missing_keys'])[:3]} ...: "
                         f"{mend}")
    return tokenizer, model.eval().requires_grad_(False)


def _open_cache(path: Path, identity: dict[str, str]):
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the text cache {path} cannot be read ({one_line(error)}): make it with "
                         "`python -m dataset.encode_prompts`") from None
    found = file.metadata() or {}
    for key, wanted in identity.items():
        if found.get(key) != wanted:
            raise ValueError(f"the text cache {path} has {key} {found.get(key)!r}, this run needs {wanted!r}: make it "
                             "again with `python -m dataset.encode_prompts`")
    return file


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(model) -> str:
    """Tells weights apart cheaply; in bf16, so that the dtype the model was loaded in makes no difference."""
    digest = hashlib.sha256()
    for weight in (model.shared.weight[:64], model.encoder.block[0].layer[0].SelfAttention.q.weight):
        digest.update(weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# --- a tiny encoder ------------------------------------------------------------------------------------------------


def make_tiny_t5(folder: str | Path, words: Iterable[str], d_model: int = 64, num_layers: int = 2, num_heads: int = 4,
                 d_ff: int = 128, seed: int = 0) -> None:
    """Write a random T5 encoder with a one-word-one-token tokenizer into `folder`, for `TextEncoder(folder)`.

    words: words or whole sentences; every word and punctuation mark in them enters the vocabulary.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    split = pre_tokenizers.Whitespace()
    pieces = sorted({piece for word in words for piece, _ in split.pre_tokenize_str(word.lower())})
    vocab = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    config = T5Config(vocab_size=len(vocab), d_model=d_model, d_kv=d_model // num_heads, d_ff=d_ff,
                      num_layers=num_layers, num_heads=num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                      pad_token_id=0, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)
