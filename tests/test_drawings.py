"""Pictures of compiled families, read back: which colour lies where, how many rings, what overlaps."""
import re
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from transformers import AutoModel, BertConfig

import zoo
from fisher_nodes.core.families import FAMILIES, body_of
from fisher_nodes.core.places import find_nodes
from fisher_nodes.experiment.drawings import COLORS, NO_NODE, draw_family, without_nodes

matplotlib.use('agg')
ROOT = Path(__file__).resolve().parent.parent
LETTERS = dict(query='q', key='k', value='v', attention_output='o', gate='g', ffn_in='u', ffn_out='d')

def one_of_each():
    "The first case of every layout, and those that differ within one."
    first = {FAMILIES[zoo.ZOO[name][0]].blocks: name for name in reversed(zoo.ZOO)}
    return sorted({*first.values(), 'llama-grouped', 'phi3-grouped', 'falcon', 't5-gated', 'dinov2-gated', 'beit', 'cohere-norms', 'deberta-talking',
                   'llama-writer', 'albert-groups', 'qwen3_moe-some', 'modernbert-biases'})

@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close('all')

def letter(color):
    "Of the role whose colour this is, a capital where it is full; a dot for no node."
    if np.allclose(color, to_rgb(NO_NODE)): return '.'
    for role, full in COLORS.items():
        full = np.array(to_rgb(full))
        if np.allclose(color, full): return LETTERS[role].upper()
        if np.allclose(color, .35*full+.65): return LETTERS[role]
    raise AssertionError(color)

def rows(ax, name):
    "Roles along a drawn matrix, one letter a row, and the axis that they lie along."
    image, = [o for o in ax.images if o.get_gid()==name]
    colors = image.get_array()
    return ''.join(map(letter, colors.reshape(-1, 3))), 0 if colors.shape[1]==1 else 1

# four heads of four rows, two key heads of four where keys are shared, written by hand from the libraries' own split of the matrix
FUSED = {
    'gpt_neox': ('query_key_value', ('QQQQKKKKvvvv'*4, 0)),
    'gpt2': ('c_attn', ('Q'*16+'K'*16+'v'*16, 1)),
    'phi3-grouped': ('qkv_proj', ('Q'*16+'K'*8+'v'*8, 0)),
    'gpt_bigcode': ('c_attn', ('Q'*16+'K'*4+'v'*4, 0)),
    'falcon': ('query_key_value', (('Q'*8+'K'*4+'v'*4)*2, 0)),
    'modernbert': ('Wi', ('G'*24+'U'*24, 0)),
    'gpt_oss': ('experts.gate_up_proj', ('GU'*24, 1))}

@pytest.mark.parametrize('name', FUSED)
def test_fused_rows_lie_where_the_library_cuts(name):
    panel, want = FUSED[name]
    ax = draw_family(zoo.build(name))
    assert rows(ax, panel)==want
    if f'{panel} bias' in [o.get_gid() for o in ax.images]: assert rows(ax, f'{panel} bias')==want

def test_what_a_scheme_weights_is_full():
    model = zoo.build('llama-grouped')
    def seen(scheme):
        ax = draw_family(model, scheme)
        return [rows(ax, f'{o}_proj')[0][0] for o in ('q','k','v','o','gate','up','down')]
    assert ''.join(seen('paper'))=='QKvoGUd'
    assert ''.join(seen('average'))=='qkvogud'
    assert ''.join(seen(dict(value='head', down='row', gate='one', up='row')))=='qkVogUD'

def centres(ax, name): return {o.get_gid(): o.get_offsets() for o in ax.collections}[f'{name} masks']

def extent(ax, name): return next(o.get_extent() for o in ax.images if o.get_gid()==name) # left, right, bottom, top; down is more

def test_rings_stand_at_what_they_multiply():
    ax = draw_family(zoo.build('gpt2'))
    left, right, bottom, top = extent(ax, 'c_fc')
    at = centres(ax, 'c_fc')
    assert (at[:,1]>bottom).all() and np.allclose(at[:,0]-left, np.arange(24)+.5)
    assert (at[:,1]<extent(ax, 'c_fc bias')[3]).all() # before the bias
    first = next(o for o in ax.images if o.get_gid()=='c_proj').get_extent()
    at = centres(ax, 'c_proj')
    assert (at[:,0]<first[0]).all() and np.allclose(at[:,1]-first[3], [2,6,10,14])
    ax = draw_family(zoo.build('gpt_oss'))
    at, (left, _, bottom, _) = centres(ax, 'experts.gate_up_proj'), extent(ax, 'experts.gate_up_proj')
    assert np.allclose(at[:,0]-left, np.arange(24)*2+1.5) and (at[:,1]>bottom).all() # every second column, from the second

def test_heads_of_a_key_are_in_its_frame():
    ax = draw_family(zoo.build('llama-grouped'))
    frames = [o.get_bbox() for o in ax.patches if o.get_gid()=='key head']
    inside = [[bool(f.x0<x<f.x1 and f.y0<y<f.y1) for x, y in centres(ax, 'o_proj')] for f in frames]
    assert inside==[[True,True,False,False], [False,False,True,True]]

@pytest.mark.parametrize('name', one_of_each())
def test_every_parameter_of_a_block_is_drawn_once_and_nothing_overlaps(name):
    model = zoo.build(name)
    blocks = {}
    for o in find_nodes(model): blocks.setdefault((re.sub(r'\d+', '', o.name), o.kind, o.site.experts), o)
    ax = draw_family(model)
    drawn = [o for o in ax.images if letter(o.get_array()[0,0])!='.' or o.get_gid().endswith(' bias')]
    plain = [o for o in ax.images if o not in drawn]
    assert len(drawn)==sum(len(o.slices) for o in blocks.values())
    assert sum(o.get_array().reshape(-1, 3).shape[0] for o in drawn if '.' not in letter(o.get_array()[0,0]))==sum(
        len(s.rows) for o in blocks.values() for parts in o.slices.values() for s in parts if s.rows is not None)
    rings = [len(o.get_offsets()) for o in ax.collections if 'masks' in str(o.get_gid())]
    assert rings==[o.site.nodes//max(o.site.experts, 1) for o in blocks.values()]
    ax.figure.canvas.draw()
    boxes = [(o.get_gid(), o.get_window_extent()) for o in (*drawn, *plain)]
    words = [(o.get_text(), o.get_window_extent()) for o in ax.texts]
    outside = [o for o in words if o[0] not in '0123AB' and not re.fullmatch(r'[qkv][\dA-D]|up|down|gate(, .*)?', o[0])]
    for pairs in (combinations(boxes, 2), combinations(words, 2), [(a, b) for a in outside for b in boxes]):
        wrong = [(a[0], b[0]) for a, b in pairs if a[1].padded(-1).overlaps(b[1].padded(-1))]
        assert not wrong
    page = ax.get_window_extent()
    assert all(page.x0-2<b.x0 and b.x1<page.x1+2 and page.y0-2<b.y0 and b.y1<page.y1+2 for _, b in (*boxes, *words))

@pytest.mark.parametrize('name', ['llama-writer', 'mixtral', 't5', 'swin', 'deberta-talking'])
def test_what_has_no_nodes_is_named(name):
    "Every parameter of the body is in a block, or below one of the names."
    model = zoo.build(name)
    inside, outside = without_nodes(model)
    blocks = find_nodes(model)
    owned = {n for o in blocks for n, parts in o.slices.items()}
    for n, _ in body_of(model).named_parameters():
        path = re.sub(r'(?<![^.])\d+(?![^.])', '{}', n)
        named = any(path.startswith(o) for o in outside) or any(re.search(rf'\}}\.{re.escape(o)}(\.|$)', path) for o in inside)
        assert (n in owned)!=named, n

def test_large_models_are_drawn_without_lines():
    with torch.device('meta'): model = AutoModel.from_config(BertConfig())
    ax = draw_family(model)
    assert rows(ax, 'self.query')==('Q'*768, 0) and len(centres(ax, 'intermediate.dense'))==3072
    assert max(ax.get_xlim())<200 and '3072 neurons' in [o.get_text() for o in ax.texts]

def test_an_axis_that_is_given_is_used():
    figure, ax = plt.subplots()
    size = tuple(figure.get_size_inches())
    model = zoo.build('llama-grouped')
    assert draw_family(model, blocks=find_nodes(model)[1:2], ax=ax) is ax
    assert tuple(figure.get_size_inches())==size and len(ax.images)==3

def test_what_cannot_be_drawn_is_refused():
    model = zoo.build('bert')
    with pytest.raises(TypeError, match='expected a transformers PreTrainedModel, got Linear'): draw_family(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match='`ax` must be one `matplotlib` axis, got list'): draw_family(model, ax=[])
    with pytest.raises(ValueError, match="role 'qurey' of the scheme is unknown"): draw_family(model, dict(qurey='head'))
    with pytest.raises(ValueError, match="role 'query' of the scheme is weighted by row, but has nodes of kind 'head'"): draw_family(model, dict(query='row'))
    with pytest.raises(ValueError, match='`blocks` is empty'): draw_family(model, blocks=[])

def test_the_number_of_model_types_is_that_of_the_table():
    said = {o: re.findall(r'(\d+) model types', (ROOT/o).read_text(encoding='utf-8')) for o in ('README.md', 'nbs/report/08_families.ipynb')}
    assert said=={o: [str(len(FAMILIES))] for o in said}
