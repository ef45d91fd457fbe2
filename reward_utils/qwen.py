"""Qwen2.5-VL as a judge of images: three questions about each, answered in one generation pass.

    scorer = QwenScorer(settings, device)
    scores, failures = scorer(images, prompts, ["rubric", "fake"])   # {"rubric": float32 [N] in 0..5, "fake": in 0..1}

Same estimator as AR-GRPO's pipeline (greedy, at most 256 new tokens, JPEG round trip), but batched over images and
questions, padded on the left, and without its retries, which repeat the same greedy answer. A row ends once its score
is written: what would follow cannot change it. An unreadable answer is NaN with a reason.

`qwenvl_expected_score` is another estimator: the answer's beginning is given, and the score is the expectation of its
first digit under the model's distribution. One forward pass, no ties, always a number; but the model neither
describes the image first nor writes fractions.

Legend: N images, Q questions, B = Q * N rows (question by question), L tokens, V vocabulary.
"""
import inspect
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from reward_utils.answers import parse_all, parse_score_json, score_is_written
from reward_utils.qwen_prompts import QUESTIONS, jpegs, question_text
from reward_utils.settings import RewardSettings
from reward_utils.weights import locate
from utils.files import parse_json, read_text

MAX_NEW_TOKENS = 256
CHECK_EVERY = 8  # tokens between looks at whether a row's score is written
ANSWER_PREFIX = '```json\n{"score": '  # of the expected-score mode

Scores = dict[str, Tensor]  # question -> float32 [N], NaN where there is none
Failures = dict[str, dict[int, str]]  # question -> {image: reason}


class QwenScorer(nn.Module):
    """bfloat16 on GPUs (also where a GPU borrows it from the CPU), reward_dtype on the CPU."""

    def __init__(self, settings: RewardSettings, device: torch.device):
        super().__init__()
        on_gpu = torch.device(device).type == "cuda" or settings.offload_rewards and torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else getattr(torch, settings.reward_dtype)
        self.model, self.processor = load_judge(locate("qwenvl_model", settings), dtype)
        self.batch_size, self.expected = settings.reward_batch_size, settings.qwenvl_expected_score
        self.accepted = inspect.signature(self.model.forward).parameters
        self.stop_early = True
        self.to(device)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str], questions: Sequence[str]) -> tuple[Scores, Failures]:
        """images uint8 [N, 3, H, W], N prompts, names of QUESTIONS -> scores in the questions' ranges, and failures."""
        scores = {question: [] for question in questions}
        failures = {question: {} for question in questions}
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            judged = (self.expect if self.expected else self.judge)(images[part], prompts[part], questions)
            for question, (values, reasons) in judged.items():
                scores[question].append(values)
                failures[question].update({start + i: reason for i, reason in reasons.items()})
        return {question: torch.cat(parts) if parts else torch.empty(0) for question, parts in scores.items()}, failures

    def judge(self, images: Tensor, prompts: Sequence[str], questions: Sequence[str]):
        """{question: (float32 [N], {image: reason})} from what the model writes."""
        inputs = self.inputs(images, prompts, questions)
        length = inputs["input_ids"].shape[1]
        stopping = [self.written(length)] if self.stop_early else []
        ids = self.model.generate(**inputs, stopping_criteria=stopping)  # [B, L + up to 256]
        return {question: parse_all(answers, parse_score_json, QUESTIONS[question].low, QUESTIONS[question].high)
                for question, answers in zip(questions, split(self.decode(ids[:, length:]), len(images)))}

    def expect(self, images: Tensor, prompts: Sequence[str], questions: Sequence[str]):
        """{question: (float32 [N], {})}: the expectation of the digit after ANSWER_PREFIX over the question's range."""
        inputs = self.inputs(images, prompts, questions, ANSWER_PREFIX)
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()  # [B, V]
        judged = {}
        for question, rows in zip(questions, logits.split(len(images))):
            digits = torch.arange(QUESTIONS[question].low, QUESTIONS[question].high + 1.0)
            probs = rows[:, [self.token(f"{digit:g}") for digit in digits.tolist()]].softmax(dim=-1)
            judged[question] = (probs @ digits, {})
        return judged

    def inputs(self, images: Tensor, prompts: Sequence[str], questions: Sequence[str], answer: str = "") -> dict:
        """The model's inputs for B rows, question by question; the vision tower sees each image once."""
        pictures = [Image.open(io.BytesIO(file), formats=("JPEG",)).convert("RGB") for file in jpegs(images)]
        chats = [[{"role": "user", "content": [{"type": "text", "text": question_text(question, prompt)},
                                               {"type": "image", "image": picture}]}]
                 for question in questions for prompt, picture in zip(prompts, pictures)]
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text + answer for text in texts], images=pictures * len(questions),
                                padding=True, padding_side="left", return_tensors="pt")
        # a model that reads them falls back to one-dimensional positions without them, silently
        assert "mm_token_type_ids" in inputs or "mm_token_type_ids" not in self.accepted, "image tokens are not marked"
        mask = inputs["attention_mask"].bool()
        # the repetition penalty counts padding as written; a row's own first token is in its prompt anyway
        first = inputs["input_ids"].gather(1, mask.int().argmax(dim=1, keepdim=True))
        inputs["input_ids"] = inputs["input_ids"].where(mask, first)
        device = next(self.parameters()).device
        return self.share_vision({name: value.to(device) for name, value in inputs.items()}, len(questions))

    def share_vision(self, inputs: dict, num_questions: int) -> dict:
        """`inputs` with the images' features in place of their pixels, where this transformers takes features."""
        if "mm_encoder_outputs" not in self.accepted:
            return inputs
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pixels, grids = inputs.pop("pixel_values"), inputs["image_grid_thw"]
        features = self.model.get_image_features(pixels.chunk(num_questions)[0], grids.chunk(num_questions)[0],
                                                 return_dict=True).pooler_output
        repeated = BaseModelOutputWithPooling(pooler_output=tuple(features) * num_questions)
        return {**inputs, "mm_encoder_outputs": {"image": repeated}}

    def written(self, start: int):
        """A stopping criterion: rows (bool [B]) whose score is complete; `start`: where the answers begin."""
        def done(ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            if (ids.shape[1] - start) % CHECK_EVERY:
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            return torch.tensor([score_is_written(text) for text in self.decode(ids[:, start:])], device=ids.device)
        return done

    def decode(self, ids: Tensor) -> list[str]:
        return self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token(self, digit: str) -> int:
        ids = self.processor.tokenizer.encode(digit, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"--qwenvl_expected_score needs a tokenizer with a token for the digit {digit}; this one "
                             f"splits it into {len(ids)}")
        return ids[0]


def split(rows: list, size: int) -> list[list]:
    return [rows[i: i + size] for i in range(0, len(rows), size)]


def load_judge(path: Path, dtype: torch.dtype):
    """Model (eval, no gradients, greedy) and processor of a hub folder; its repetition penalty is kept.

    The shipped configuration samples at temperature 1e-6, which is greedy in all but name.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    try:
        for file in path.glob("*.json"):
            parse_json(read_text(file), str(file))  # of a damaged one tokenizers raises a bare Exception
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True,
            local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as Qwen2.5-VL ({' '.join(str(error).split())[:300]})") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"{path}: not the weights of Qwen2.5-VL ({len(missing)} are missing, the first {missing[0]})")
    shipped = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, repetition_penalty=float(shipped.repetition_penalty or 1.0),
        bos_token_id=shipped.bos_token_id, eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id)
    return model.eval().requires_grad_(False), processor
