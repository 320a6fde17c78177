"""Checkpoints in 66 layouts, loaded by transformers and by this project: `make parity-checkpoints`.

Each has new random weights and one layout of each kind: weights, image settings, chat template, special tokens and
generation config; every layout of weights meets every layout of image settings. Compared are prompt ids (text, images,
tools), image settings, special tokens, sampling and end tokens, the values of every tensor, and logits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import ImageConfig, Model

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
TOOL = {"type": "function", "function": {"name": "measure", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = (
    "{{ bos_token }}NAME{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template; NAME is replaced, so that each gives other ids."""


@dataclass
class Parts:
    """A checkpoint before it is written.

    Attributes:
        seed: of everything random.
        tensors: by name.
        json: content of the JSON files by name.
        texts: content of the other files by path.
        n_shards: files that the weights are written to.
        old: weights written before, with an index, as two shards.
        is_index_only: whether of those only the index is written.
    """

    seed: int
    tensors: dict[str, torch.Tensor]
    json: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)
    n_shards: int = 1
    old: dict[str, torch.Tensor] | None = None
    is_index_only: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.json["processor_config.json"]["image_processor"]
        return settings

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        if self.old is not None:
            save_weights(self.old, folder, 2)
            for file in folder.glob("*.safetensors") if self.is_index_only else ():
                file.unlink()
        save_weights(self.tensors, folder, self.n_shards)
        for name, content in self.json.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        for name, text in self.texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def save_weights(tensors: dict[str, torch.Tensor], folder: Path, n_shards: int) -> None:
    """Write weights as one file, or as shards with an index."""
    names = sorted(tensors)
    listed: dict[str, str] = {}
    for number in range(n_shards):
        file = f"model-{number + 1:05}-of-{n_shards:05}.safetensors" if n_shards > 1 else SINGLE
        part = {name: tensors[name].contiguous() for name in names[number::n_shards]}
        save_file(part, folder / file, {"format": "pt"})
        listed |= dict.fromkeys(part, file)
    if n_shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}), encoding="utf-8")


def new_parts(seed: int) -> Parts:
    """Return a reference checkpoint with new random weights."""
    folder = REFERENCE / "abc"[seed % 3] / "checkpoint"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    generator = torch.Generator().manual_seed(seed)
    for name, values in tensors.items():
        noise = torch.randn(values.shape, generator=generator) * 0.05
        tensors[name] = (values.float() + noise).to(values.dtype)
    files = [path for path in folder.glob("*.json") if path.name != INDEX]
    texts = {"chat_template.jinja": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    return Parts(seed, tensors, {path.name: json.loads(path.read_text(encoding="utf-8")) for path in files}, texts)


Edit = Callable[[Parts], None]


def other_head(parts: Parts) -> None:
    parts.tensors[HEAD] = parts.tensors[EMBEDDING].flip(0)


def other_head_by_one_config(parts: Parts) -> None:
    other_head(parts)
    parts.json["config.json"]["text_config"]["tie_word_embeddings"] = False
    del parts.json["config.json"]["tie_word_embeddings"]


def same_head(parts: Parts) -> None:
    parts.tensors[HEAD] = parts.tensors[EMBEDDING].clone()


def only_head(parts: Parts) -> None:
    parts.tensors[HEAD] = parts.tensors.pop(EMBEDDING)


def untied(parts: Parts) -> None:
    other_head(parts)
    parts.json["config.json"]["tie_embedding"] = False


def sharded(parts: Parts) -> None:
    parts.n_shards = 3


def beside_older_shards(parts: Parts) -> None:
    parts.old = {name: torch.zeros_like(values) for name, values in parts.tensors.items()}


def index_of_missing_files(parts: Parts) -> None:
    beside_older_shards(parts)
    parts.is_index_only = True


def published_names(parts: Parts) -> None:
    start = "model.vision_tower."
    names = {name: name.replace(f"{start}vision_model.", start) for name in parts.tensors}
    parts.tensors = {name.replace(start, f"{start}vision_model."): parts.tensors[old] for old, name in names.items()}


def with_value_head(parts: Parts) -> None:
    parts.tensors["v_head.summary.weight"] = torch.ones(1, parts.tensors[EMBEDDING].shape[1])


def several_types(parts: Parts) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16)
    parts.tensors = {name: values.to(types[at % 3]) for at, (name, values) in enumerate(parts.tensors.items())}


WEIGHTS: tuple[Edit, ...] = (
    *(other_head, other_head_by_one_config, same_head, only_head, untied),
    *(sharded, beside_older_shards, index_of_missing_files, published_names, several_types),
    with_value_head,
)


def nested(parts: Parts) -> None:
    parts.settings.update(max_tiles=8, use_thumbnail=parts.seed % 2 == 0)


def nested_beside_others(parts: Parts) -> None:
    parts.json["preprocessor_config.json"] = {**parts.settings, "max_tiles": 3, "use_thumbnail": False}
    del parts.settings["use_thumbnail"]


def nested_in_part(parts: Parts) -> None:
    kind = parts.settings["image_processor_type"]
    parts.json["processor_config.json"]["image_processor"] = {"image_processor_type": kind, "resample": 3}


def preprocessor(parts: Parts) -> None:
    parts.json["preprocessor_config.json"] = {**parts.settings, "max_tiles": 6, "max_pixels_tolerance": 1.5}
    parts.json["processor_config.json"] = {"processor_class": "Lfm2VlProcessor"}


def preprocessor_beside_flat(parts: Parts) -> None:
    kind = parts.settings["image_processor_type"]
    parts.json["preprocessor_config.json"] = {"image_processor_type": kind, "min_tiles": 3}
    parts.json["processor_config.json"] = {"processor_class": "Lfm2VlProcessor", "max_tiles": 4, "resample": 3}


def one_tile(parts: Parts) -> None:
    preprocessor(parts)
    del parts.json["processor_config.json"]
    parts.json["preprocessor_config.json"] |= {
        "do_image_splitting": parts.seed % 2 == 0,
        "min_tiles": 1,
        "max_tiles": 1,
    }


SETTINGS: tuple[Edit, ...] = (
    *(nested, nested_beside_others, nested_in_part, preprocessor, preprocessor_beside_flat, one_tile),
)


def template_file(parts: Parts) -> None:
    parts.texts["chat_template.jinja"] = TEMPLATE.replace("NAME", "file")


def template_in_tokenizer(parts: Parts) -> None:
    parts.json["tokenizer_config.json"]["chat_template"] = parts.texts.pop("chat_template.jinja")


def template_list(parts: Parts) -> None:
    del parts.texts["chat_template.jinja"]
    names = ("default", "tool_use", "rag")
    templates = [{"name": name, "template": TEMPLATE.replace("NAME", name)} for name in names]
    parts.json["tokenizer_config.json"]["chat_template"] = templates


def template_folder(parts: Parts) -> None:
    for name in ("tool_use", "my-own"):
        parts.texts[f"additional_chat_templates/{name}.jinja"] = TEMPLATE.replace("NAME", name)
    parts.json["tokenizer_config.json"]["chat_template"] = "ignored"


def template_json(parts: Parts) -> None:
    parts.json["chat_template.json"] = {"chat_template": TEMPLATE.replace("NAME", "json")}
    if parts.seed % 2:
        del parts.texts["chat_template.jinja"]


def template_in_processor(parts: Parts) -> None:
    parts.json.setdefault("processor_config.json", {})["chat_template"] = TEMPLATE.replace("NAME", "processor")


def template_object(parts: Parts) -> None:
    del parts.texts["chat_template.jinja"]
    templates = {name: TEMPLATE.replace("NAME", name) for name in ("default", "tool_use")}
    parts.json["tokenizer_config.json"]["chat_template"] = templates


TEMPLATES: tuple[Edit, ...] = (
    *(template_file, template_in_tokenizer, template_list, template_folder, template_json),
    *(template_in_processor, template_object),
)


def tokens_as_they_are(parts: Parts) -> None:
    pass


def tokens_in_map(parts: Parts) -> None:
    config = parts.json["tokenizer_config.json"]
    parts.json["special_tokens_map.json"] = {name: config.pop(name) for name in ("bos_token", "eos_token")}


def tokens_in_both(parts: Parts) -> None:
    parts.json["special_tokens_map.json"] = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}


def tokens_in_ignored_map(parts: Parts) -> None:
    tokens_in_both(parts)
    added = parts.json["tokenizer.json"]["added_tokens"]
    parts.json["tokenizer_config.json"]["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
    }


TOKENS: tuple[Edit, ...] = (tokens_as_they_are, tokens_in_map, tokens_in_both, tokens_in_ignored_map)


def generation(**values: Any) -> Edit:
    def edit(parts: Parts) -> None:
        stated = parts.json["generation_config.json"]
        kept = {name: stated[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        parts.json["generation_config.json"] = kept | values
        if "eos" in values:
            del parts.json["generation_config.json"]["eos"]
            parts.json["generation_config.json"]["eos_token_id"] = [kept["eos_token_id"], 300, 301]

    edit.__name__ = " ".join(f"{name}={value}" for name, value in values.items()) or "nothing"
    return edit


GENERATION: tuple[Edit, ...] = (
    generation(do_sample=False, temperature=0.7),
    generation(do_sample=True, temperature=0.7, top_p=0.9),
    generation(do_sample=True),
    generation(),
    generation(do_sample=True, min_p=0.05, repetition_penalty=1.2, eos=3),
)


def layouts() -> Iterator[tuple[int, tuple[Edit, ...]]]:
    """Yield a seed and the edits of each checkpoint."""
    for seed in range(len(WEIGHTS) * len(SETTINGS)):
        turn = seed // len(WEIGHTS)
        yield (
            seed,
            (
                WEIGHTS[seed % len(WEIGHTS)],
                SETTINGS[turn],
                TEMPLATES[(seed + turn) % len(TEMPLATES)],
                TOKENS[(seed + seed // 4) % len(TOKENS)],
                GENERATION[(seed + turn) % len(GENERATION)],
            ),
        )


def differences(parts: Parts, folder: Path) -> list[str]:
    """Return what transformers and this project read differently from a checkpoint."""
    parts.save(folder / "checkpoint")
    processor = transformers.AutoProcessor.from_pretrained(folder / "checkpoint")
    network = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "checkpoint", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    result = convert_checkpoint(folder / "checkpoint", folder, quant="F32", mmproj_quant="F32")
    with Model.open(folder) as model:
        found = {
            "tensors": tensors_of(network)
            != Counter(
                digest(tensor.data)
                for path in (result.model, result.mmproj)
                for tensor in gguf.GGUFReader(path).tensors
            ),
            "ids": any(theirs != ours for theirs, ours in prompts(processor, model, folder)),
            "logits": not same_logits(network, model),
            "settings": any(
                tuple(np.ravel(getattr(processor.image_processor, one.name)))
                != tuple(np.ravel(getattr(model.config.image, one.name)))
                for one in fields(ImageConfig)
            ),
            "special tokens": (processor.tokenizer.bos_token, processor.tokenizer.eos_token)
            != (model.config.bos_token, model.config.eos_token),
            "sampling": not same_sampling(network.generation_config, model),
        }
    return [name for name, differs in found.items() if differs]


def digest(values: Any) -> str:
    """Return a hash of a tensor's values without their order, which the converter may change."""
    return hashlib.sha256(np.sort(np.asarray(values, np.float32), axis=None).tobytes()).hexdigest()


def tensors_of(network: Any) -> Counter[str]:
    own = {values.data_ptr(): values for values in network.parameters()}
    return Counter(digest(values.detach().numpy()) for values in own.values())


def prompts(processor: Any, model: Model, folder: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of conversations by transformers and by this project."""
    paths = [folder / "small.png", folder / "large.png"]
    for path, size in zip(paths, ((90, 130), (1100, 700)), strict=True):
        Image.new("RGB", size, (200, 30, 90)).save(path)
    text = {"type": "text", "text": "what is 12345?\n don't"}
    parts = [{"type": "image", "path": str(path)} for path in paths]
    messages: list[dict[str, Any]]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    template = processor.chat_template or processor.tokenizer.get_chat_template()
    template = template if isinstance(template, str) else template["default"]
    for content in ([text], [*parts, text]):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        theirs = processor.apply_chat_template(copy.deepcopy(messages), chat_template=template, **options)
        yield np.ravel(theirs["input_ids"]).tolist(), model.token_ids(messages)
    of_processor = not isinstance(processor.chat_template, dict) and processor.chat_template
    if not of_processor and "tools" in processor.tokenizer.get_chat_template(tools=[TOOL]):
        messages = [{"role": "user", "content": "what is 12345?"}]
        chosen = processor.tokenizer.apply_chat_template(messages, tools=[TOOL], **options)
        yield chosen["input_ids"], model.token_ids(messages, tools=[TOOL])


def same_logits(network: Any, model: Model) -> bool:
    messages = [{"role": "user", "content": "what is 12345?"}]
    with torch.no_grad():
        theirs = network(input_ids=torch.tensor([model.token_ids(messages)])).logits[0, -1].numpy()
    ours = model.next_token_logits(messages)
    return bool(np.abs(theirs - ours).max() <= 1e-3 * np.abs(theirs).max())


def same_sampling(config: Any, model: Model) -> bool:
    """Return whether sampling and end tokens are as transformers' `generate` has them."""
    ours, ends = model.config.sampling, np.ravel(config.eos_token_id)
    if not all(model.engine.is_end(int(token)) for token in ends):
        return False
    if config.do_sample is None:
        return True  # the model's published sampling
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return (ours.temperature, ours.repetition_penalty) == (0, penalty)
    stated = (config.temperature or 1.0, config.min_p or 0.0, config.top_p or 1.0, penalty)
    return stated == (ours.temperature, ours.min_p, ours.top_p, ours.repetition_penalty)


def main() -> int:
    """Print a line for each checkpoint, and the number of those that are read alike."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    n_equal = n_all = 0
    for seed, edits in layouts():
        parts = new_parts(seed)
        for edit in edits:
            edit(parts)
        with tempfile.TemporaryDirectory() as folder:
            found = differences(parts, Path(folder))
        n_all, n_equal = n_all + 1, n_equal + (not found)
        names = ", ".join(edit.__name__.replace("_", " ") for edit in edits)
        print(f"{seed + 1:3} {'equal' if not found else 'DIFFERS: ' + ', '.join(found)}  {names}", flush=True)
    print(f"{n_equal} of {n_all} checkpoints are read as transformers {transformers.__version__} reads them")
    return int(n_equal != n_all)


if __name__ == "__main__":
    sys.exit(main())
