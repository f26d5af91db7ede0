"""Bad command lines of `maxtext-ling2`, in a folder of odd files: exit code, and words of the error.

`ref`, `grads` stand for files that fit the Hugging Face folder `hf`.
"""

import numpy as np

from checkpoint import folders

GOLDEN = folders.GOLDEN / "one_cycle"
USAGE, CONTENT = 2, 1


def prepare(folder):
  """Fills a folder with what the command lines name."""
  folders.copy(folder / "hf")
  for name in ("empty", "step/items", "run/7", "folder.yml", "broken_tokenizer"):
    (folder / name).mkdir(parents=True)
  (folder / "broken_tokenizer" / "tokenizer.json").write_text("{")
  for name, content in {
    "file": b"text",
    "zero": b"",
    "asked": b'[{"role": "user", "content": "Hi"}]',
    "answered": b'[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]',
    "binary": bytes(range(256)) * 4,
    "latin": "café".encode("latin-1"),
    "zero.yml": b"",
    "binary.yml": bytes(range(256)),
    "list.yml": b"- a\n- b\n",
    "broken.yml": b"a: [1\nb: {",
    "tab.yml": b"base_config: base.yml\n\tsteps: 3\n",
    "odd_chip.yml": b"flop: 1",
    "fast_chip.yml": b"flops: fast",
    "half_link.yml": b"links: 1.5",
    "large_chip.yml": b"memory: 1.0e+15",
    "twice.yml": b"base_config: base.yml\nsteps: 3\nsteps: 4\n",
    "loop.yml": b"base_config: loop.yml\nmodel_name: ling2-custom\n",
    "orphan.yml": b"base_config: gone.yml\nmodel_name: ling2-custom\n",
  }.items():
    (folder / name).write_bytes(content)
  _arrays(folder)


def _arrays(folder):
  recorded = {
    key: value for key, value in np.load(GOLDEN / "io_short.npz").items() if key in ("input_ids", "labels", "eval.logits")
  }
  ids, logits = recorded["input_ids"], recorded["eval.logits"]
  name = "model.norm.weight"
  for file, changes in {
    "ref": {},
    "float_ids": {"input_ids": ids.astype(float)},
    "flat_ids": {"input_ids": ids.ravel()},
    "large_ids": {"input_ids": ids + 10**6},
    "negative_ids": {"input_ids": ids - 10**6},
    "ids_of_64_bits": {"input_ids": ids + 2**40},  # they would pass for the right ones in 32 bits
    "no_rows": {"input_ids": ids[:0], "eval.logits": logits[:0]},
    "no_tokens": {"input_ids": ids[:, :0], "eval.logits": logits[:, :0]},
    "short_logits": {"eval.logits": logits[:, :5]},
    "other_vocabulary": {"eval.logits": logits[..., :5]},
    "text_logits": {"eval.logits": np.full(logits.shape, "a")},
    "scalar_logits": {"eval.logits": np.float32(1)},
    "pickled": {"input_ids": np.array([{}], object)},
    "other_labels": {"labels": recorded["labels"][:, :3]},
    "large_labels": {"labels": recorded["labels"] + 10**6},
  }.items():
    np.savez(folder / f"{file}.npz", **recorded | changes)
  np.savez(folder / "grads.npz", **{name: np.zeros(64, np.float32)})
  np.savez(folder / "no_grads.npz")
  np.savez(folder / "unknown_grads.npz", **{"model.x": np.zeros(3)})
  np.savez(folder / "misshapen_grads.npz", **{name: np.zeros((3, 3), np.float32)})
  np.savez(folder / "text_grads.npz", **{name: np.full(64, "a")})
  np.savez(folder / "grads_of_large_ids.npz", input_ids=ids + 10**6, **{name: np.zeros(64, np.float32)})
  np.save(folder / "one.npy", ids)
  whole = (folder / "ref.npz").read_bytes()
  (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
  damaged = bytearray(whole)
  damaged[len(whole) // 2] ^= 0xFF
  (folder / "flipped.npz").write_bytes(damaged)


def _verify(options, reference="ref", offset=1):
  return f"verify hf --decay-offset {offset} --reference {reference}.npz {options}".strip()


AGAIN = "record the reference again"
UNDERSTOOD = "--help' for help"

COMMANDS = {
  # Which command
  "": (USAGE, ["usage"]),
  "nonsense": (USAGE, ["no such command 'nonsense'", UNDERSTOOD]),
  "--nonsense": (USAGE, ["--nonsense", UNDERSTOOD]),
  "doctor x": (USAGE, ["unexpected extra argument", "(x)", UNDERSTOOD]),
  "doctor --jsn": (USAGE, ["--jsn", "--json"]),
  # config
  "config": (USAGE, ["missing argument 'hf_dir'", UNDERSTOOD]),
  "config hf extra": (USAGE, ["(extra)", UNDERSTOOD]),
  "config hf -o": (USAGE, ["'-o' requires an argument"]),
  "config nowhere": (CONTENT, ["nowhere/config.json", "pass a hugging face folder"]),
  "config file": (CONTENT, ["file/config.json", "pass a hugging face folder"]),
  "config empty": (CONTENT, ["empty/config.json", "pass a hugging face folder"]),
  "config /dev/null": (CONTENT, ["/dev/null/config.json", "pass a hugging face folder"]),
  "config hf -o empty": (CONTENT, ["-o empty", "is a folder", "name a file"]),
  "config hf -o file": (CONTENT, ["-o file", "exists already", "--force"]),
  "config hf -o nowhere/x.yml": (CONTENT, ["-o nowhere/x.yml", "no folder nowhere", "name a file"]),
  "config hf -o file/x.yml": (CONTENT, ["-o file/x.yml", "no folder file", "name a file"]),
  "config hf -o /proc/x.yml": (CONTENT, ["/proc/x.yml", "name a path"]),
  # batch
  "batch": (USAGE, ["missing argument 'settings'", UNDERSTOOD]),
  "batch nowhere.yml": (CONTENT, ["nowhere.yml", "pass a base yaml file"]),
  "batch nonsense": (CONTENT, ["'nonsense': not a setting of maxtext", "write key=value"]),
  "batch steps=3 --rows 0": (USAGE, ["--rows", "greater than or equal to 1"]),
  "batch model_name=ling2-tiny override_model_config=true group_norm_size=3": (
    CONTENT,
    ["group_norm_size=3", "choose a divisor"],
  ),
  "batch model_name=ling2-tiny dataset_type=grain grain_file_type=parquet grain_train_files=nowhere": (
    CONTENT,
    ["dataset_type=grain", "nowhere", "correct the settings of the data"],
  ),
  # verify: options
  "verify": (USAGE, ["missing argument 'hf_dir'", UNDERSTOOD]),
  "verify hf": (USAGE, ["pass --reference"]),
  "verify hf --grads grads.npz": (USAGE, ["pass --reference"]),
  "verify hf --reference": (USAGE, ["'--reference' requires an argument"]),
  _verify("", offset=2): (USAGE, ["--decay-offset", "less than or equal to 1"]),
  _verify("", offset="x"): (USAGE, ["--decay-offset", "valid integer"]),
  _verify("--rows 0"): (USAGE, ["--rows", "greater than or equal to 1"]),
  _verify("--rows 1"): (USAGE, ["--rows 1", "pass --grads"]),
  _verify("--decode 0"): (CONTENT, ["--decode 0", "read 1 to one less"]),
  _verify("--decode -3"): (CONTENT, ["--decode -3", "read 1 to one less"]),
  _verify("--decode 1000"): (CONTENT, ["--decode 1000", "read 1 to one less"]),
  _verify("--decode x"): (USAGE, ["--decode", "valid integer"]),
  _verify("--remat nonsense"): (CONTENT, ["remat_policy=nonsense", "such as full, minimal"]),
  _verify("--mesh x"): (CONTENT, ["--mesh x", "name each of data"]),
  _verify("--mesh fsdp=0"): (CONTENT, ["--mesh fsdp=0", "positive numbers"]),
  _verify("--mesh fsdp=two"): (CONTENT, ["--mesh fsdp=two", "positive numbers"]),
  _verify("--mesh fsdp=2,fsdp=2"): (CONTENT, ["'fsdp' occurs twice", "at most once"]),
  _verify("--mesh pipeline=2"): (CONTENT, ["'pipeline' is not an axis", "name each of data"]),
  _verify("--mesh fsdp=99"): (CONTENT, ["--mesh needs 99 devices", "jax_platforms=cpu"]),
  _verify("--mesh fsdp=2 --decode 3"): (CONTENT, ["--decode with --mesh", "leave one"]),
  _verify("--logits-key x"): (CONTENT, ["ref.npz", "no array 'x'", "name one"]),
  _verify("--ids-key x"): (CONTENT, ["ref.npz", "no array 'x'", "name one"]),
  _verify("--ids-key eval.logits"): (CONTENT, ["ref.npz", "expected integer token ids", AGAIN]),
  "verify hf --orbax nowhere": (CONTENT, ["nowhere", "pass the folder of a checkpoint's step"]),
  "verify hf --orbax file": (CONTENT, ["file", "pass the folder of a checkpoint's step"]),
  "verify hf --orbax empty": (CONTENT, ["empty", "pass the folder of a step"]),
  "verify hf --orbax empty --via-orbax": (USAGE, ["--orbax empty", "leave one of them out"]),
  "verify hf --orbax empty --mesh fsdp=2": (USAGE, ["--mesh goes with --reference"]),
  "verify hf --orbax empty --grads grads.npz": (USAGE, ["--grads grads.npz", "leave out --orbax"]),
  "verify hf --via-orbax --decode 3": (USAGE, ["--decode 3", "leave out --orbax"]),
  "verify empty --via-orbax": (CONTENT, ["empty/config.json", "pass a hugging face folder"]),
  "verify nowhere --reference ref.npz": (CONTENT, ["nowhere/config.json", "pass a hugging face folder"]),
  # verify: files
  _verify("", "nowhere"): (CONTENT, ["nowhere.npz", "no such file", "name the npz"]),
  **{
    f"verify hf --reference {file}": (CONTENT, [file, "not a readable npz", AGAIN])
    for file in ("empty", "file", "zero", "binary", "cut.npz", "one.npy", "flipped.npz", "pickled.npz")
  },
  _verify("", "float_ids"): (CONTENT, ["float_ids.npz", "float64", "expected integer token ids", AGAIN]),
  _verify("", "flat_ids"): (CONTENT, ["flat_ids.npz", "(48,)", "expected integer token ids", AGAIN]),
  _verify("", "no_rows"): (CONTENT, ["no_rows.npz", "(0, 24)", "holds no tokens", AGAIN]),
  _verify("", "no_tokens"): (CONTENT, ["no_tokens.npz", "(2, 0)", "holds no tokens", AGAIN]),
  **{
    _verify("", file): (CONTENT, [f"{file}.npz", "vocabulary has 384", "take the reference of this model"])
    for file in ("large_ids", "negative_ids", "ids_of_64_bits")
  },
  **{
    _verify("", file): (CONTENT, [f"{file}.npz", "expected float (2, 24, 384)", AGAIN])
    for file in ("short_logits", "other_vocabulary", "text_logits", "scalar_logits")
  },
  _verify("--grads nowhere.npz"): (CONTENT, ["nowhere.npz", "no such file", "name the npz"]),
  _verify("--grads zero"): (CONTENT, ["zero", "not a readable npz", AGAIN]),
  _verify("--grads no_grads.npz"): (CONTENT, ["no_grads.npz", "holds no gradients", "are expected"]),
  _verify("--grads unknown_grads.npz"): (CONTENT, ["unknown_grads.npz", "no parameter model.x", "take the gradients"]),
  _verify("--grads misshapen_grads.npz"): (CONTENT, ["misshapen_grads.npz", "(3, 3), expected float (64,)", AGAIN]),
  _verify("--grads text_grads.npz"): (CONTENT, ["text_grads.npz", "expected float (64,)", AGAIN]),
  _verify("--grads grads_of_large_ids.npz"): (CONTENT, ["grads_of_large_ids.npz", "vocabulary has 384"]),
  _verify("--grads grads.npz", "other_labels"): (CONTENT, ["other_labels.npz", "labels are (2, 3)", AGAIN]),
  _verify("--grads grads.npz", "large_labels"): (CONTENT, ["large_labels.npz", "labels holds ids", "vocabulary has 384"]),
  # generate
  "generate": (USAGE, ["missing argument 'checkpoint'", UNDERSTOOD]),
  "generate hf": (USAGE, ["pass --prompt text, or --chat file"]),
  "generate hf --prompt a --chat file": (USAGE, ["--prompt and --chat", "leave one out"]),
  "generate hf --prompt a --system-prompt b": (USAGE, ["--system-prompt", "pass --chat, or leave it out"]),
  "generate hf --prompt a --chat-template file": (USAGE, ["--chat-template", "pass --chat, or leave it out"]),
  "generate hf --prompt - --prompt -": (USAGE, ["--prompt -", "only once"]),
  "generate hf --chat nowhere": (CONTENT, ["nowhere: no such file", "name a path"]),
  "generate hf --chat empty": (CONTENT, ["empty: is a directory", "name a path"]),
  "generate hf --chat binary": (CONTENT, ["binary", "not a text in utf-8", "convert it"]),
  "generate hf --chat file": (CONTENT, ["file: not json", "write a list of messages"]),
  "generate hf --chat zero": (CONTENT, ["zero: there is no conversation", "write at least one message"]),
  "generate hf --chat answered": (CONTENT, ["answered: the last message is the assistant's", "take it out"]),
  "generate hf --chat asked": (CONTENT, ["hf", "pass --tokenizer"]),
  "generate hf --chat asked --tokenizer TOKENIZER": (CONTENT, ["no chat template", "pass --tokenizer with a folder"]),
  "generate step --prompt a --model ling2-custom": (CONTENT, ["--model ling2-custom", "--model my.yml"]),
  "generate step --prompt a --model nowhere.yml": (CONTENT, ["nowhere.yml: no such file", "pass a model_name"]),
  "generate hf --prompt a --top-k -1": (CONTENT, ["--top-k -1", "pass at least 1"]),
  "generate hf --prompt a --top-k 3": (CONTENT, ["--top-k 3", "pass --temperature 1, or leave them out"]),
  "generate hf --prompt a --stop ''": (CONTENT, ["--stop ''", "pass a text that is not empty"]),
  "generate hf --prompt a --batch-size 0": (CONTENT, ["--batch-size 0", "pass at least 1"]),
  "generate nowhere --prompt a": (CONTENT, ["nowhere", "pass that of a checkpoint"]),
  "generate file --prompt a": (CONTENT, ["file", "pass that of a checkpoint"]),
  "generate empty --prompt a": (CONTENT, ["empty", "pass a folder that is one"]),
  "generate run --prompt a": (CONTENT, ["run/7", "pass a folder that is one"]),
  "generate hf --prompt a": (CONTENT, ["hf", "pass --tokenizer"]),
  "generate hf --prompt a --model ling2": (CONTENT, ["--model ling2", "leave it out"]),
  "generate hf --prompt a model_name=ling9": (CONTENT, ["--model ling9", "leave it out"]),
  "generate hf --prompt a --tokens 0": (CONTENT, ["--tokens 0", "pass at least 1"]),
  "generate hf --prompt a --tokens x": (USAGE, ["--tokens", "valid integer"]),
  "generate hf --prompt a --temperature -1": (CONTENT, ["--temperature -1.0", "are needed"]),
  "generate hf --prompt a --temperature nan": (CONTENT, ["--temperature nan", "are needed"]),
  "generate hf --prompt a --temperature inf": (CONTENT, ["--temperature inf", "are needed"]),
  "generate hf --prompt a --top-p 0": (CONTENT, ["--top-p 0.0", "are needed"]),
  "generate hf --prompt a --top-p 2": (CONTENT, ["--top-p 2.0", "are needed"]),
  "generate hf --prompt a --top-p nan": (CONTENT, ["--top-p nan", "are needed"]),
  "generate hf --prompt a --seed x": (USAGE, ["--seed", "valid integer"]),
  "generate hf --prompt a --seed -1": (USAGE, ["--seed", "greater than or equal to 0"]),
  "generate hf --prompt a --seed 99999999999999999999": (USAGE, ["--seed", "less than or equal to"]),
  "generate hf --prompt a --tokenizer nowhere": (CONTENT, ["nowhere", "pass --tokenizer"]),
  "generate hf --prompt a --tokenizer empty": (CONTENT, ["empty", "pass --tokenizer"]),
  "generate hf --prompt a --tokenizer binary": (CONTENT, ["binary", "pass --tokenizer"]),
  "generate hf --prompt a --tokenizer zero": (CONTENT, ["zero", "pass --tokenizer"]),
  "generate hf --prompt a --tokenizer broken_tokenizer": (CONTENT, ["broken_tokenizer", "pass --tokenizer"]),
  "generate hf --prompt a word": (CONTENT, ["'word'", "write key=value"]),
  "generate hf --prompt a =3": (CONTENT, ["'=3'", "write key=value"]),
  "generate hf --prompt a dtype=[": (CONTENT, ["dtype=[", "put quotes around it"]),
  "generate hf --prompt a steps={a:]": (CONTENT, ["steps={a:]", "put quotes around it"]),
  "generate hf --prompt a --tokenizer TOKENIZER group_norm_siz=4": (
    CONTENT,
    ["group_norm_siz=4", "did you mean 'group_norm_size'"],
  ),
  "generate hf --prompt a --tokenizer TOKENIZER group_norm_size=3": (CONTENT, ["group_norm_size=3", "choose a divisor"]),
  "generate hf --prompt a --tokenizer TOKENIZER quantize_kvcache=true": (
    CONTENT,
    ["quantize_kvcache=true", "set it to false"],
  ),
  "generate hf --prompt a --tokenizer TOKENIZER attention=paged": (CONTENT, ["attention=paged", "`maxtext-ling2 eval`"]),
  "generate step --prompt a --tokenizer TOKENIZER --model ling9": (CONTENT, ["model_name=ling9", "did you mean 'ling2'"]),
  # eval
  "eval": (USAGE, ["missing argument 'checkpoint'", UNDERSTOOD]),
  "eval hf": (USAGE, ["missing option '--text'", UNDERSTOOD]),
  "eval hf --text nowhere": (CONTENT, ["nowhere: no such file", "name a path"]),
  "eval hf --text empty": (CONTENT, ["empty: is a directory", "name a path"]),
  "eval hf --text binary": (CONTENT, ["binary", "not a text in utf-8", "convert it"]),
  "eval hf --text latin": (CONTENT, ["latin", "not a text in utf-8", "convert it"]),
  "eval hf --text file --length 0": (USAGE, ["--length", "greater than or equal to 1"]),
  "eval hf --text file --length x": (USAGE, ["--length", "valid integer"]),
  "eval hf --text file": (CONTENT, ["hf", "pass --tokenizer"]),
  "eval nowhere --text file": (CONTENT, ["nowhere", "pass that of a checkpoint"]),
  "eval hf --text file --decay-offset 2": (USAGE, ["--decay-offset", "not one of '0', '1', 'both'"]),
  "eval hf --text file --decay-offset both gla_decay_layer_offset=1": (
    CONTENT,
    ["--decay-offset both and gla_decay_layer_offset=1", "leave one out"],
  ),
  "eval hf word --text file": (CONTENT, ["'word'", "write key=value"]),
  "eval hf --text file --model ling2": (CONTENT, ["--model ling2", "leave it out"]),
  # plan
  "plan": (USAGE, ["missing argument 'model'", UNDERSTOOD]),
  "plan ling2": (USAGE, ["missing option '--topology'", UNDERSTOOD]),
  "plan ling2 --topology": (USAGE, ["'--topology' requires an argument"]),
  "plan ling2 --topology v6e-8 --check --search": (USAGE, ["--check and --search", "leave all but one out"]),
  "plan ling2 --topology v6e-8 --check --json x.json": (USAGE, ["--check, --json x.json", "leave one of them out"]),
  **{
    f"plan ling2 --topology v6e-8 --chip {file}": (CONTENT, [f"--chip {file}", "write"])
    for file in ("nowhere.yml", "zero.yml", "list.yml", "broken.yml", "binary.yml")
  },
  "plan ling2 --topology v6e-8 --chip odd_chip.yml": (CONTENT, ["flop is no figure of a chip", "did you mean flops"]),
  "plan ling2 --topology v6e-8 --chip fast_chip.yml": (CONTENT, ["flops='fast' is not a positive number", "correct it"]),
  "plan ling2 --topology v6e-8 --chip half_link.yml": (CONTENT, ["links=1.5 is not a whole number", "correct it"]),
  "plan ling2 --topology v6e-8 --chip large_chip.yml": (CONTENT, ["memory=1000000000000000", "give at most that"]),
  "plan ling2 --topology h100-8": (CONTENT, ["--topology h100-8", "with one of v4"]),
  "plan ling2 --topology v6e-7": (CONTENT, ["--topology v6e-7", "see its compile_topology"]),
  "plan ling2 --topology v6e": (CONTENT, ["--topology v6e", "see its compile_topology"]),
  "plan nowhere.yml --topology v6e-4": (CONTENT, ["nowhere.yml: no such file", "pass a model_name"]),
  "plan folder.yml --topology v6e-4": (CONTENT, ["folder.yml: no such file", "pass a model_name"]),
  **{
    f"plan {file}.yml --topology v6e-4": (CONTENT, [f"{file}.yml", "write it again with `maxtext-ling2 config`"])
    for file in ("zero", "binary", "list", "broken", "tab")
  },
  "plan twice.yml --topology v6e-4": (CONTENT, ["twice.yml", "duplicate key steps", "correct it"]),
  "plan loop.yml --topology v6e-4": (CONTENT, ["loop.yml", "correct it, base_config first"]),
  "plan orphan.yml --topology v6e-4": (CONTENT, ["orphan.yml", "gone.yml", "correct it, base_config first"]),
  "plan ling2 --topology v6e-4 word": (CONTENT, ["word", "write key=value"]),
  "plan ling2 --topology v6e-4 =3": (CONTENT, ["=3", "write key=value"]),
  "plan ling2 --topology v6e-4 --mesh expart=8": (CONTENT, ["--mesh expart=8", "name each of data"]),
  "plan ling2 --topology v6e-4 --mesh expert=x": (CONTENT, ["--mesh expert=x", "positive numbers"]),
  "plan ling2 --topology v6e-4 --mesh expert": (CONTENT, ["--mesh expert", "positive numbers"]),
  "plan ling2 --topology v6e-4 compile_topology_num_slices=x": (CONTENT, ["num_slices", "valid integer"]),
  "plan ling2 --topology v6e-4 compile_topology_num_slices=0": (CONTENT, ["num_slices=0", "pass at least 1"]),
  "plan ling2 --topology v6e-4 group_norm_size=3": (CONTENT, ["group_norm_size=3", "choose a divisor"]),
  "plan ling2 --topology v6e-4 ici_pipeline_parallelism=2": (CONTENT, ["ici_pipeline_parallelism=2", "use fsdp"]),
  "plan ling9 --topology v6e-4": (CONTENT, ["model_name=ling9", "did you mean 'ling2'"]),
  "plan ling2 --topology v6e-4 --json empty": (CONTENT, ["--json empty", "name a file"]),
  "plan ling2 --topology v6e-4 --json nowhere/x.json": (CONTENT, ["--json nowhere/x.json", "name a file"]),
  "plan ling2 --topology v6e-4 --png x.nonsense": (CONTENT, ["--png x.nonsense", "use one that ends in .png"]),
  "plan ling2 --topology v6e-4 --png nowhere/x.png": (CONTENT, ["--png nowhere/x.png", "name a file"]),
  # demo
  "demo extra": (USAGE, ["(extra)", UNDERSTOOD]),
  "demo --steps 0": (USAGE, ["--steps", "greater than or equal to 1"]),
  "demo --steps x": (USAGE, ["--steps", "valid integer"]),
  "demo --output": (USAGE, ["'--output' requires an argument"]),
  "demo --output file": (CONTENT, ["file/data: not a directory", "name a path"]),
  "demo --output file/x": (CONTENT, ["file/x/data: not a directory", "name a path"]),
  "demo --output /proc/x": (CONTENT, ["/proc/x", "name a path"]),
  # run
  "run": (USAGE, ["missing argument 'module'", UNDERSTOOD]),
  "run -x": (USAGE, ["usage: python -m maxtext_ling2 run"]),
  **{
    f"run {module}": (CONTENT, [f"no module '{module}'", "give a name as for `python -m`"])
    for module in ("absent", "maxtext.absent", "file.py", "/abs/path", "json.", ".", "..a", "os.path.join")
  },
  "run maxtext": (CONTENT, ["'maxtext' is a package", "give the name of one of its modules"]),
}
"""Words are compared without regard to case and line breaks."""
