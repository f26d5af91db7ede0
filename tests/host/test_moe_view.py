"""What MaxText's experts read from their view of the config: tiles by chip, unless the user has set them."""

import copy
import dataclasses
import itertools
import os
import pickle
from types import SimpleNamespace

import jax
import pytest
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh

import tiny  # noqa: F401  MaxText's environment
from maxtext_ling2.configs import tiles
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.moe_view import DeepSeekRoutingView, Placement, placement, rows_per_expert
from maxtext_ling2.ops.experts import tiles as expert_tiles

FIELD = "wi_tile_dlhs_embed_dim"


def load(*words, model="ling2", yml=None, **kwargs):
  """MaxText's config object; no devices are counted for it."""
  from maxtext.configs import pyconfig

  base = yml or os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
  return pyconfig.initialize(["", str(base), f"model_name={model}", *words], **kwargs)


def mesh(kind, **sizes):
  platform = "tpu" if kind.startswith("TPU") else kind
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=AbstractDevice(kind, None, platform))


@dataclasses.dataclass(frozen=True)
class Config:
  """What the view reads of ling2's config on 64 devices, one row of 4096 tokens on each."""

  emb_dim: int = 2048
  moe_mlp_dim: int = 512
  num_experts: int = 256
  num_experts_per_tok: int = 8
  max_target_length: int = 4096
  micro_batch_size_to_train_on: int = 64
  micro_batch_size_to_eval_on: int = 256
  dtype: str = "bfloat16"
  num_moe_emb_chunks: int = 0
  custom_mesh_and_rule: str = ""

  def __getattr__(self, name):
    if name in tiles.TILES:
      return tiles.BY_CHIP
    raise AttributeError(name)


@pytest.fixture(scope="module")
def untouched():
  return load()


def test_the_24_fields_are_maxtexts(untouched):
  from maxtext.configs import types

  named = {name for name in types.MaxTextConfig.model_fields if "_tile_" in name and name[:2] in ("wi", "wo", "ev")}
  assert set(tiles.TILES) == named and len(named) == 24


def test_where_nobody_has_set_a_tile_the_config_says_by_chip(untouched):
  assert {getattr(untouched, field) for field in tiles.TILES} == {tiles.BY_CHIP}
  assert untouched.moe_use_direct_token_gather is True and untouched.router_topk_matmul_vjp is True
  assert untouched.prefuse_moe_weights is False


def test_another_model_keeps_maxtexts_values():
  config = load(model="deepseek2-16b")
  assert {getattr(config, field) for field in tiles.TILES} == {512, 1024}
  assert config.moe_use_direct_token_gather is False and config.router_topk_matmul_vjp is False


@pytest.mark.parametrize("value", [256, 1024])  # 1024 is MaxText's own
@pytest.mark.parametrize("how", ["word", "keyword", "variable", "yml", "inherited"])
def test_a_tile_that_the_user_sets_wins_however_he_sets_it(how, value, monkeypatch, tmp_path):
  yml = None
  if how == "variable":
    monkeypatch.setenv(f"M_{FIELD.upper()}", str(value))
  if how in ("yml", "inherited"):
    yml = tmp_path / "mine.yml"
    yml.write_text(f"base_config: base.yml\n{FIELD}: {value}\n")
  if how == "inherited":
    (yml := tmp_path / "heir.yml").write_text("base_config: mine.yml\n")
  words = [f"{FIELD}={value}"] if how == "word" else []
  config = load(*words, yml=yml, **({FIELD: value} if how == "keyword" else {}))
  view = DeepSeekRoutingView(config, mesh("TPU v5", fsdp=1))
  assert getattr(config, FIELD) == getattr(view, FIELD) == value
  assert view.wi_tile_dlhs_mlp_dim == 512  # the table's
  assert getattr(session.changed(config, steps=7), FIELD) == value


@pytest.mark.parametrize("field", ["moe_use_direct_token_gather", "router_topk_matmul_vjp"])
def test_so_does_a_switch(field):
  assert getattr(load(f"{field}=false"), field) is False


def test_copies_of_a_config_still_know_it(untouched):
  import copy

  for config in (session.changed(untouched, steps=7), copy.deepcopy(untouched)):
    assert {getattr(config, field) for field in tiles.TILES} == {tiles.BY_CHIP}


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_the_view_answers_each_field_from_the_table(kind):
  view = DeepSeekRoutingView(Config(), mesh(kind, fsdp=64))
  sizes = {"embed_dim": 2048, "mlp_dim": 512}
  for (product, (k_axis, n_axis)), prefix in itertools.product(expert_tiles.AXES.items(), ("", "eval_")):
    if prefix and not product.endswith("fwd"):
      continue
    rows = 512 if prefix else 128
    expected = expert_tiles.tiles(kind, product, sizes[k_axis], sizes[n_axis], rows)
    projection, direction = product.split("_")
    name = f"{prefix}{projection}_tile_{direction}_"
    assert tuple(getattr(view, name + axis) for axis in ("batch_seq", k_axis, n_axis)) == expected


def test_all_rows_divide_those_to_which_maxtext_pads():
  for kind, fsdp in itertools.product(("TPU v5", "TPU v6 lite", "TPU7x"), (1, 4, 16, 64)):
    view = DeepSeekRoutingView(Config(), mesh(kind, fsdp=fsdp))
    for field, (_, axis) in tiles.TILES.items():
      if axis == "batch_seq":
        assert getattr(view, tiles.padding(field)) % getattr(view, field) == 0


def test_the_tables_rows_follow_the_padding_that_the_user_sets():
  config = SimpleNamespace(
    **{
      **dict.fromkeys(tiles.TILES, tiles.BY_CHIP),
      **vars(Config()),
      "wi_tile_fwd_batch_seq": 64,
      "micro_batch_size_to_train_on": 2048,
    }
  )
  view = DeepSeekRoutingView(config, mesh("TPU v5", fsdp=64))
  assert {
    getattr(view, field) for field, (_, axis) in tiles.TILES.items() if axis == "batch_seq" and "eval" not in field
  } == {64}


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3"])
def test_without_a_tpu_the_tiles_are_maxtexts(kind):
  from maxtext.configs import types

  view = DeepSeekRoutingView(Config(), mesh(kind, fsdp=64))
  for field in tiles.TILES:
    assert getattr(view, field) == types.MaxTextConfig.model_fields[field].default


def test_rows_per_expert_are_those_of_all_devices_that_share_the_experts():
  def rows(evaluation=False, **sizes):
    return rows_per_expert(Config(), placement(mesh("TPU v5", **sizes)), evaluation)

  assert rows(fsdp=64) == 128 and rows(fsdp=8, expert=8) == 1024
  assert rows(fsdp=64, evaluation=True) == 512
  assert rows(fsdp=16, tensor=4) == 512 and rows(fsdp=16, context=4) == 128
  assert rows(fsdp=16, tensor_transpose=4) == 512  # these hold the same tokens


def test_experts_along_the_context_axis():
  """MaxText's cp-as-ep: four devices of a sequence hold a quarter of the experts each."""
  assert placement(mesh("TPU v5", fsdp=8, context=4, expert=2), True).experts == 8
  config = Config(custom_mesh_and_rule=SimpleNamespace(value="cp-as-ep"))
  views = [DeepSeekRoutingView(one, mesh("TPU v5", fsdp=16, context=4)) for one in (config, Config())]
  assert [view.wi_tile_fwd_batch_seq for view in views] == [256, 128]  # 512 and 128 rows per expert


def test_a_width_in_parts_is_looked_up_as_the_kernel_gets_it():
  view = DeepSeekRoutingView(Config(num_moe_emb_chunks=4), mesh("TPU v5", fsdp=64))
  assert (view.wi_tile_fwd_embed_dim, view.wo_tile_fwd_embed_dim) == (512, 1024)


def test_float32_products_get_tiles_that_fit():
  """Twice the bytes: of flash's on v5p the columns are halved."""
  widths = {"emb_dim": 4096, "moe_mlp_dim": 1024}
  views = [
    DeepSeekRoutingView(Config(dtype=dtype, **widths), mesh("TPU v5", fsdp=64)) for dtype in ("bfloat16", "float32")
  ]
  assert [(view.wi_tile_fwd_embed_dim, view.wi_tile_fwd_mlp_dim) for view in views] == [(4096, 512), (4096, 256)]


def test_other_names_of_a_generation():
  for alias, kind in (("TPU v5p", "TPU v5"), ("TPU v5e", "TPU v5 lite"), ("TPU v6e", "TPU v6 lite")):
    assert placement(mesh(alias, fsdp=1)).kind == kind


def test_a_shared_hidden_width_is_looked_up_as_it_is_on_a_device():
  assert placement(mesh("TPU v5", fsdp=16, tensor=4)) == Placement("TPU v5", 64, 4, 1, 1)
  view = DeepSeekRoutingView(Config(), mesh("TPU v5", fsdp=16, tensor=4))
  assert (view.wi_tile_fwd_embed_dim, view.wi_tile_fwd_mlp_dim) == (2048, 128)


def test_views_of_one_config_and_placement_are_equal_and_hash_alike():
  config = Config()
  one, same, other = (DeepSeekRoutingView(config, mesh(kind, fsdp=4)) for kind in ("TPU v5", "TPU v5", "TPU v6 lite"))
  assert one == same == DeepSeekRoutingView(one, mesh("TPU v5", fsdp=4)) and hash(one) == hash(same)
  assert one != other and one != DeepSeekRoutingView(Config(), mesh("TPU v5", fsdp=4))


def test_copies_of_a_view_route_as_it_does(untouched):
  """Not as the config it looks at, whose own way of copying it must not lend."""
  view = DeepSeekRoutingView(Config(), mesh("TPU v5", fsdp=4))
  for twin in (copy.copy(view), copy.deepcopy(view), copy.deepcopy([view])[0]):
    assert twin == view and twin.model_name == "deepseek3-ling2"
  twin = pickle.loads(pickle.dumps(view))
  assert type(twin) is DeepSeekRoutingView and twin._placement == view._placement and twin._config == view._config
  real = DeepSeekRoutingView(untouched, mesh("TPU v5", fsdp=4))
  assert copy.deepcopy(real).decoder_block.value == "deepseek"


def test_the_mesh_of_real_devices_names_their_kind():
  real = jax.make_mesh((1,), ("fsdp",))
  assert placement(real).kind == jax.devices()[0].device_kind


def problems(**set_fields):
  config = {
    **dict.fromkeys(tiles.TILES, tiles.BY_CHIP),
    "sparse_matmul": True,
    "megablox": True,
    "use_tokamax_gmm": False,
  }
  return list(tiles.problems(SimpleNamespace(**(config | set_fields))))


def test_rows_that_megablox_would_refuse_are_refused_by_name_with_the_way_out():
  (text,) = problems(wo_tile_dlhs_batch_seq=512)
  assert "wo_tile_dlhs_batch_seq=512" in text and "set wi_tile_fwd_batch_seq=512, too" in text
  (text,) = problems(wi_tile_fwd_batch_seq=192, wo_tile_fwd_batch_seq=128)
  assert "wo_tile_fwd_batch_seq=128" in text and "set wi_tile_fwd_batch_seq=384, too" in text
  (text,) = problems(eval_wo_tile_fwd_batch_seq=256)
  assert "set eval_wi_tile_fwd_batch_seq=256, too" in text
  (text,) = problems(wi_tile_fwd_batch_seq=100)
  assert "wi_tile_fwd_batch_seq=100" in text
  (text,) = problems(wi_tile_fwd_mlp_dim=-1)
  assert "wi_tile_fwd_mlp_dim=-1" in text


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"wi_tile_fwd_batch_seq": 512},
    {"wo_tile_drhs_batch_seq": 64},
    {"wo_tile_dlhs_batch_seq": 512, "wi_tile_fwd_batch_seq": 1024},
    {"wo_tile_dlhs_batch_seq": 512, "megablox": False},
    {"wo_tile_dlhs_batch_seq": 512, "sparse_matmul": False},
    {field: 512 for field, (_, axis) in tiles.TILES.items() if axis == "batch_seq"},
  ],
)
def test_others_are_not(fields):
  assert not problems(**fields)


def test_a_config_is_refused_while_it_is_read():
  with pytest.raises(ValueError, match="wo_tile_dlhs_batch_seq=512.*set wi_tile_fwd_batch_seq=512, too"):
    load("wo_tile_dlhs_batch_seq=512")


def test_a_switch_that_nothing_reads_beside_the_direct_gather_is_refused():
  with pytest.raises(ValueError, match="use_gather_mosaic_kernel=True: LING2 does not have this"):
    load("use_gather_mosaic_kernel=true")
