"""Every row of the table is proved, and every wrong row is caught, by the tests that are named."""
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import THIRD
import torch
import transformers
from torch.testing import assert_close

from fisher_nodes.core import places
from fisher_nodes.core.families import FAMILIES, FFN
from fisher_nodes.core.places import find_places
from fisher_nodes.core.prove import TESTS, Case, complaints, make_case, make_twin, node_codes, prove, random_inputs, steps_of
from zoo import ZOO, build

transformers.logging.set_verbosity_error()

MIXED = { # case -> the matrix whose rows move other heads too: a norm over all heads, or heads that talk
    'olmo2': "'q_proj'", 'olmo3': "'q_proj'", 'deberta-talking': "'self.in_proj'"}

@pytest.mark.parametrize('name', THIRD((o for o in ZOO if o not in MIXED), 2))
def test_every_row_proves_itself(name):
    proof = prove(build(name), progress=False)
    assert set(proof.tests)==set(TESTS) and proof.blocks

@pytest.mark.parametrize('name', MIXED)
def test_what_mixes_heads_is_seen(name):
    with pytest.raises(ValueError, match=f"rows of query in .*{MIXED[name]}.* move heads they do not belong to"): prove(build(name), progress=False)

def test_one_head_of_ownership_is_right_without_the_norm_over_heads():
    model = make_twin(build('olmo2'))
    for o in model.layers: o.self_attn.q_norm = o.self_attn.k_norm = torch.nn.Identity()
    case = Case(model, random_inputs(model))
    assert not [o for r in ('query', 'key') for o in complaints(case, 'ownership', r)]

# --- wrong rows -----------------------------------------------------------------------------

def block(i, **wrong):
    "A row with one block said wrongly."
    return lambda family: replace(family, blocks=(*family.blocks[:i], replace(family.blocks[i], **wrong), *family.blocks[i+1:]))

def swapped(i, a, b): return lambda family: block(i, **{a: getattr(family.blocks[i], b), b: getattr(family.blocks[i], a)})(family)

def gates(family): return replace(family, blocks=tuple(replace(o, up=o.gate, gate=o.up) if isinstance(o, FFN) and o.gate else o for o in family.blocks))

BOTH = {'ownership', 'identities'} # and more: a test of all may only add to it
WRONG = { # name -> case, how its row is made wrong, tests that see it, and how wide heads are said to be
    'gpt2 as groups': ('gpt2', block(0, order='groups'), BOTH),
    'phi3 as groups': ('phi3', block(0, order='groups'), BOTH),
    'gpt_neox as blocks': ('gpt_neox', block(0, order='blocks'), BOTH),
    'bloom as blocks': ('bloom', block(0, order='blocks'), BOTH),
    'falcon as blocks': ('falcon', block(0, order='blocks'), BOTH),
    'deberta as blocks': ('deberta', block(0, order='blocks'), BOTH),
    'phi3 up first': ('phi3', block(1, first='up'), {'identities'}),
    'modernbert up first': ('modernbert', block(1, first='up'), {'identities'}),
    'llama gate is up': ('llama', gates, {'identities'}),
    'mt5 gate is up': ('mt5', gates, {'identities'}),
    'phi3 gate row by row': ('phi3', block(1, order='groups'), BOTH),
    'bert query is value': ('bert', swapped(0, 'query', 'value'), {'partition', 'identities'}),
    'bert key is value': ('bert', swapped(0, 'key', 'value'), {'partition', 'identities'}),
    'deberta without positions': ('deberta', block(0, also=()), {'completeness'}),
    'longformer without globals': ('longformer', block(0, also=()), {'completeness', 'identities'}),
    'half the heads, bert': ('bert', block(0), {'partition'}, 2),
    'half the heads, llama': ('llama-grouped', block(0), {'partition'}, 2),
    'twice the heads, bert': ('bert', block(0), {'ownership'}, .5),
    'bigcode as blocks': ('gpt_bigcode-heads', block(0, order='blocks'), BOTH),
    'distilbert key is value': ('distilbert', swapped(0, 'key', 'value'), {'partition', 'identities'}),
    'bart query is value': ('bart', swapped(0, 'query', 'value'), {'partition', 'identities'}),
    'bart crossing key is value': ('bart', swapped(3, 'key', 'value'), {'partition', 'identities'}),
    'bart crosses nothing': ('bart', block(3, path='decoder.layers.{}.self_attn'), {'completeness'}),
    't5 gate is up': ('t5-gated', gates, {'identities'}),
    'qwen3 gate is up': ('qwen3', gates, {'identities'}),
    'half the heads, vit': ('vit', block(0), {'partition'}, 2),
    'twice the heads, gpt2': ('gpt2', block(0), {'ownership'}, .5),
    'deberta without biases': ('deberta', block(0, raw=()), {'identities'}),
    'vit query is value': ('vit', swapped(0 if hasattr(build('vit'), 'layers') else 2, 'query', 'value'), {'partition', 'identities'})}

def catches(model):
    "The tests that complain."
    found = set()
    try: find_places(model)
    except ValueError: found.add('completeness')
    case = make_case(model)
    return found | {t for t, role in steps_of(case) if next(complaints(case, t, role), None)}

@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_row_is_caught(name, monkeypatch):
    case, wrong, tests, *wide = WRONG[name]
    model, right = build(case), places.head_size
    monkeypatch.setitem(FAMILIES, model.config.model_type, wrong(FAMILIES[model.config.model_type]))
    if wide: monkeypatch.setattr(places, 'head_size', lambda *a: int(right(*a)*wide[0]))
    found = catches(model)
    print(name, found)
    assert tests<=found and (len(tests)>1 or found<=tests | {'direct'}), found
    with pytest.raises(ValueError): prove(model, progress=False)

# --- and what goes with it ------------------------------------------------------------------

def test_nothing_of_the_caller_changes():
    model = build('llama-grouped').float().train()
    state = {k: o.clone() for k, o in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    prove(model, twin=False, progress=False)
    assert torch.equal(torch.get_rng_state(), states[0]) and (random.getstate(), np.random.get_state()[1].tolist())==states[1:]
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert model.training and model.dtype==torch.float32 and all(o.requires_grad for o in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_own_inputs_and_without_gradients():
    model = build('bert')
    inputs = dict(input_ids=torch.randint(4, 60, (3, 9)), attention_mask=torch.tensor([[1]*9, [1]*5+[0]*4, [1]*7+[0]*2]))
    with torch.no_grad(): proof = prove(model, inputs, halves=8, progress=False)
    assert proof.tests['ownership']<40 and 'proved in' in repr(proof)

def test_codes_tell_any_two_nodes_apart():
    for n in (1, 2, 3, 12, 64):
        codes = torch.stack(node_codes(n))
        assert all((codes[:, i]!=codes[:, j]).any() for i in range(n) for j in range(i)) and codes.any(0).all()

def test_a_random_forward_is_refused():
    model = build('bert').train()
    model.encoder.layer[0].attention.output.register_forward_hook(lambda m, args, z: z+torch.rand_like(z))
    with pytest.raises(ValueError, match='the forward pass is random'): prove(model, twin=False, progress=False)

def test_a_family_that_cannot_be_made_smaller_says_so(monkeypatch):
    model = build('bert')
    def fail(*args, **kwargs): raise TypeError('no such config')
    monkeypatch.setattr(type(model), '_from_config', fail)
    with pytest.raises(ValueError, match='cannot be made smaller .TypeError: no such config.; give `twin=False`'): prove(model, progress=False)
    assert prove(model, twin=False, progress=False).blocks==4

def test_a_family_without_a_row_is_told_how_to_get_one():
    with pytest.raises(ValueError, match='`describe.model.`.*fisher-nodes describe MODEL'): prove(transformers.CTRLModel(transformers.CTRLConfig(
        vocab_size=60, n_embd=16, n_layer=1, n_head=2, dff=8, n_positions=10)))
