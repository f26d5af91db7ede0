"""LING2 in Flax NNX, built from MaxText's layers where they compute what LING2 needs.

    decoder.py           all layers, scanned or unscanned
      block.py           one cycle of layers: the body of the layer scan
        layer.py         h += attention(norm(h)); h += mlp(norm(h))
          gla.py         linear attention: most layers
            rope.py, sharded_gla.py (to ops/), norms.py
          mla.py         softmax attention over latents: the last layer of a cycle
            rope.py, yarn.py
          moe.py         router, routed experts, shared experts
            moe_view.py  the config as MaxText's experts read it
    mtp.py               multi-token prediction: further layers on the decoder's output

Read them in this order. Beside them: `layer_layout.py` (which layer is GLA, MLA, dense or experts, and what a scan
stacks), `remat.py` (rematerialisation of one layer), `precision.py` (float32 products), `contract.py` (what this folder
needs of MaxText). The same model on one page, in PyTorch, without MaxText: `examples/torch_ling2.py`.

Shapes in comments: B batch, T sequence, C hidden, H heads, D head dimension, E experts, k experts per token, V
vocabulary, K MTP depths.
"""
