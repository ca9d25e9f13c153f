"""Prompts as labels: what a pipeline's text encoders make of them, in one table, on disk.

prompts.safetensors holds embeddings [P + 1, L, D], and pooled ones [P + 1, E] where the family has them. Row P is what
the pipeline guides away from: the empty prompt, or the zeros that some pipelines put in its place. prompts.json says
whose they are, and at which size the teacher is asked.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillroom.codecs.tokens import quiet, transformers
from stillroom.flows.families import Family, family_of, latents_of, model_config
from stillroom.nets.build import buildable
from stillroom.nets.folders import built, local_folder, read_json, understood
from stillroom.nets.weights import read_weights
from stillroom.settings import Refusal
from stillroom.settings.files import new_folder

INDEX, TABLE, FORMAT = "prompts.json", "prompts.safetensors", 1
WANTED = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer*/*", "text_encoder*/*")
LONGEST = 512
"""Tokens of T5 that the pipelines take."""
TOLD = 3.5
"""Guidance that Flux's pipeline tells its model unless asked otherwise."""


@buildable
@dataclass(frozen=True)
class Prompts:
    """All of a table but its numbers."""

    pipeline: str
    size: int                   # pixels a side
    shape: tuple[int, ...]      # of the latents
    embeddings: tuple[int, int, int]
    pooled: tuple[int, ...]     # () where the family has none
    encoders: str               # digest of what made them
    sha256: str
    texts: tuple[str, ...]
    length: int = 0             # tokens of T5; 0 where there are none
    guidance: float = 0.0       # what a guidance-distilled teacher is told; 0 of others
    dtype: str = "float32"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeddings": self.embeddings} | ({"pooled": self.pooled} if self.pooled else {})


def read_lines(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()     # files of Windows' editors bear a mark
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file}: no readable text file ({error}); give one with a prompt on each line") from error
    if not (texts := tuple(text for line in lines if (text := line.strip()))):
        raise Refusal(f"{file}: holds no prompts; write one on each line")
    return texts


def open_prompts(folder: str | Path) -> tuple[Prompts, dict[str, Tensor]]:
    """The prompts and their table, whole and unchanged."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise Refusal(f"prompts {folder}: no {INDEX} is there; write it with: stillroom cache --prompts FILE --teacher "
                      f"FOLDER --size PIXELS --out {folder}")
    content: dict[str, Any] = read_json(folder / INDEX)
    if content.pop("format", None) != FORMAT:
        raise Refusal(f"prompts {folder}: another format than {FORMAT}, which this stillroom reads; cache them again")
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        prompts = Prompts(**fields)
    except TypeError as error:
        raise Refusal(f"{folder / INDEX}: not what stillroom cache writes ({error}); cache the prompts again") from None
    table = read_weights(folder / TABLE)
    shapes, rows = {k: tuple(v.shape) for k, v in table.items()}, len(prompts.texts) + 1
    if (digest_of(table), shapes, prompts.embeddings[0]) != (prompts.sha256, prompts.shapes(), rows):
        raise Refusal(f"{folder / TABLE}: is not the table that {INDEX} tells of; cache the prompts again")
    return prompts, table


def cache_prompts(file: Path, teacher: str, size: int, out: Path, length: int = 0, guidance: float = 0.0,
                  precision: Literal["float32", "bfloat16"] = "float32", batch: int = 16, device: str = "cpu",
                  told: Callable[[int], object] = lambda done: None) -> Prompts:
    """Writes the table of a file's prompts. The same one again is left as it is."""
    texts = read_lines(file)
    root = local_folder(teacher, WANTED)
    family = family_of(root)
    if length and not family.lengths:
        raise Refusal(f"length {length}: a {family.pipeline} has no T5, and prompts of one length; leave it out")
    if length > LONGEST:
        raise Refusal(f"length {length}: the pipelines take at most {LONGEST} tokens of T5")
    is_told = bool(model_config(root, family).get("guidance_embeds"))
    if guidance and not is_told:
        raise Refusal(f"guidance {guidance:g}: {teacher} is not told one; leave it out here, and give it to distill")
    prompts = Prompts(
        family.pipeline, size, latents_of(root, family, size), (0, 0, 0), (), encoders_digest(root, family), "", texts,
        length or family.lengths, (guidance or TOLD) if is_told else 0.0, precision)
    if (out / INDEX).is_file() and same(held := open_prompts(out)[0], prompts):
        return held
    with new_folder(out) as new:
        table = encoded(root, family, prompts, batch, device, told)
        shapes = {name: tuple(x.shape) for name, x in table.items()}
        prompts = dataclasses.replace(prompts, embeddings=shapes["embeddings"], pooled=shapes.get("pooled", ()),
                                      sha256=digest_of(table))
        save_file(table, new / TABLE)
        (new / INDEX).write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(prompts)}, indent=1),
                                 encoding="utf-8")
    return prompts


def same(a: Prompts, b: Prompts) -> bool:
    """But for the table, which one of the two may not have."""
    return dataclasses.replace(a, embeddings=b.embeddings, pooled=b.pooled, sha256=b.sha256) == b


def digest_of(table: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(table.items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- whose text encoders ----

BLOCKS, BLOCK = 256, 4096


def encoders_digest(root: Path, family: Family) -> str:
    """Names the text encoders and tokenizers by their files; of weights, which may be of gigabytes, by their sizes and
    by samples from all over them."""
    digest = hashlib.sha256(json.dumps(bool(read_json(root / "model_index.json").get("force_zeros_for_empty_prompt",
                                                                                     True))).encode())
    for part in family.encoders:
        for folder in (root / part, root / part.replace("text_encoder", "tokenizer")):
            files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt", ".model", ".safetensors"))
            if not files:
                raise Refusal(f"{folder} is missing: prompts are cached with the text encoders of the teacher's own "
                              "folder, and told by them; download it whole")
            for file in files:
                digest.update(f"{part}/{file.name} ".encode())
                for block in sampled(file) if file.suffix == ".safetensors" else [settings_of(file)]:
                    digest.update(block)
    return digest.hexdigest()


def sampled(file: Path) -> Iterator[bytes]:
    """All of a small file; of a large one, blocks at even distances."""
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as stream:
        for i in range(min(BLOCKS, -(-size // BLOCK))):
            stream.seek(i * max(BLOCK, size // BLOCKS))
            yield stream.read(BLOCK)


def settings_of(file: Path) -> bytes:
    """A configuration without where and by which version it was saved; another file as it is."""
    if file.name != "config.json":
        return file.read_bytes()
    kept = {k: v for k, v in read_json(file).items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(kept, sort_keys=True).encode()


# ---- what they make of the prompts ----


@torch.inference_mode()
def encoded(root: Path, family: Family, prompts: Prompts, batch: int, device: str,
            told: Callable[[int], object]) -> dict[str, Tensor]:
    """The table, by the pipeline's own `encode_prompt`."""
    with quiet():
        pipe = encoding_pipeline(root, family, getattr(torch, prompts.dtype), device)
    rows, nulls = [], []
    for i in range(0, len(prompts.texts), batch):
        some, null = family.encode(pipe, list(prompts.texts[i : i + batch]), device, prompts.length, i == 0)
        rows.append({k: v.cpu() for k, v in some.items()})
        nulls += [{k: v[:1].cpu() for k, v in null.items()}] if null else []
        told(min(i + batch, len(prompts.texts)))
    table = {name: torch.cat([*(row[name] for row in rows), nulls[0][name]]) for name in rows[0]}
    for name, x in table.items():
        if not bool(torch.isfinite(x).all()):
            raise Refusal(f"{root}: its text encoders answer {name} that are not finite in {prompts.dtype}; cache with "
                          "--precision float32")
    return {name: x.to(getattr(torch, prompts.dtype)).contiguous() for name, x in table.items()}


def encoding_pipeline(root: Path, family: Family, dtype: torch.dtype, device: str) -> Any:
    """The pipeline with its text encoders and tokenizers; its model is there in name, and has no weights."""
    import diffusers

    index = read_json(root / "model_index.json")
    parts: dict[str, Any] = {}
    for part in family.encoders:
        tokenizer = part.replace("text_encoder", "tokenizer")
        parts[part] = encoder(root, index, part).to(device=device, dtype=dtype)
        parts[tokenizer] = component(root, index, tokenizer)
    config = {k: v for k, v in model_config(root, family).items() if not k.startswith("_")}
    with torch.device("meta"):
        parts[family.part] = built(family.model, understood(family.model, config))
    known = {"force_zeros_for_empty_prompt", "requires_safety_checker"} & index.keys()
    kind = getattr(diffusers, family.pipeline)
    parts |= {name: index[name] for name in known} | dict.fromkeys(family.unused)
    return kind(**(parts | ({"requires_safety_checker": False} if "safety_checker" in family.unused else {})))


def encoder(root: Path, index: Mapping[str, Any], part: str) -> Any:
    """With all of its weights and no others: transformers itself would draw missing ones at random."""
    require_weights(root / part)
    model, info = component(root, index, part, output_loading_info=True, dtype=torch.float32, use_safetensors=True)
    wrong = [f"{len(info[kind])} {kind.replace('_', ' ')} ({', '.join(map(str, list(info[kind])[:3]))})"
             for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    if wrong:
        raise Refusal(f"{root / part}: the weights do not fit the config.json: {'; '.join(wrong)}; download it again")
    return model.eval()


def require_weights(place: Path) -> None:
    """Where they lie under another name, transformers would say that there are none."""
    known = any((place / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json"))
    if not known and (others := ", ".join(sorted(f.name for f in place.glob("*.safetensors")))):
        raise Refusal(f"{place}: {WEIGHTS} is missing; there is {others}: rename it")


WEIGHTS = "model.safetensors"
KNOWN = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "CLIPTokenizer", "CLIPTokenizerFast",
         "T5Tokenizer", "T5TokenizerFast")


def component(root: Path, index: Mapping[str, Any], part: str, **how: Any) -> Any:
    library, name = index.get(part) or (None, None)
    if library != "transformers" or name not in KNOWN:
        raise Refusal(f"{root / 'model_index.json'}: {part} is {name or 'missing'}, and must be one of "
                      f"{', '.join(KNOWN[:3] if part.startswith('text') else KNOWN[3:])}")
    with readable(root / part):
        return getattr(transformers(), name).from_pretrained(root / part, local_files_only=True, **how)


@contextmanager
def readable(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise Refusal(f"{place}: transformers cannot load it ({type(error).__name__}: {said}); download it again, with "
                      "safetensors") from error
