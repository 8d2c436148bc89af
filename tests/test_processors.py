"""Image processors and feature extractors: found beside a model, given, saved with a merge and loaded again; the numbers made here by hand."""
import json
import math

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, Value
from torch.testing import assert_close
from transformers import (
    AutoFeatureExtractor, AutoImageProcessor, BertConfig, BertModel, CLIPConfig, CLIPForImageClassification, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification, ViTImageProcessor,
    Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification, WhisperConfig, WhisperForConditionalGeneration)

import words
from fisher_nodes import Merged, evaluate, mask_fisher, merge, predict
from fisher_nodes.engine.models import load_tokenizer
from fisher_nodes.tasks.tasks import load_rows

PIL = pytest.importorskip('PIL.Image', reason='pictures are read with Pillow')
QUIET = dict(progress=False)
SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
SOUND = SIZE | dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                    classifier_proj_size=8)

def vit(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SIZE, image_size=8, patch_size=4, num_channels=1, num_labels=2)).eval()

def grey(mean=.4, std=.3): return ViTImageProcessor(do_resize=False, image_mean=[mean], image_std=[std])

def pictures(n=7):
    try: grey()(images=PIL.fromarray(np.zeros((8, 8), np.uint8)))
    except ValueError as e: pytest.skip(f'transformers {transformers.__version__} reads no grey pictures: {e}')
    numbers = np.random.RandomState(0).randint(0, 256, (n, 8, 8)).astype(np.uint8)
    return numbers, Dataset.from_dict(dict(image=[PIL.fromarray(o) for o in numbers], label=[i%2 for i in range(n)]))

def by_hand(numbers, mean=.4, std=.3):
    pixels = (numbers[:, None]/255-mean)/std
    return Dataset.from_dict(dict(pixel_values=pixels.tolist(), labels=[i%2 for i in range(len(numbers))]))

@pytest.fixture
def folders(tmp_path):
    for i, t in enumerate('ab'):
        vit(i).save_pretrained(tmp_path/t)
        grey().save_pretrained(tmp_path/t)
    return {t: tmp_path/t for t in 'ab'}

def test_a_folder_brings_its_processor(folders):
    numbers, rows = pictures()
    want = mask_fisher(vit(), by_hand(numbers), **QUIET)
    for got in (mask_fisher(folders['a'], rows, **QUIET), mask_fisher(vit(), rows, tokenizer=grey(), **QUIET)):
        for kind, layers in want.kinds.items():
            for a, b in zip(got.kinds[kind], layers, strict=True): assert_close(a, b, rtol=1e-4, atol=0)
    assert_close(predict(folders['a'], rows, **QUIET), predict(vit(), by_hand(numbers), **QUIET), rtol=1e-4, atol=1e-6)
    assert evaluate(folders['a'], rows, **QUIET)==evaluate(vit(), by_hand(numbers), **QUIET)

def test_a_merge_keeps_the_processor(folders, tmp_path):
    numbers, rows = pictures()
    merged = merge(folders, data=dict.fromkeys('ab', rows), num_samples=None, **QUIET)
    hand = merge({t: vit(i) for i, t in enumerate('ab')}, data=dict.fromkeys('ab', by_hand(numbers)), num_samples=None, **QUIET)
    assert_close(merged.body.state_dict(), hand.body.state_dict(), rtol=1e-4, atol=1e-6)
    merged.save_pretrained(tmp_path/'both')
    assert list(AutoImageProcessor.from_pretrained(tmp_path/'both').image_mean)==[.4]
    again = Merged.from_pretrained(tmp_path/'both')
    assert list(again.tokenizer.image_std)==[.3]
    assert torch.equal(predict(tmp_path/'both'/'b', rows, **QUIET), predict(merged['b'], rows, tokenizer=again.tokenizer, **QUIET))
    card = (tmp_path/'both'/'README.md').read_text()
    assert 'import AutoModelForImageClassification, AutoImageProcessor\n' in card and 'processor = AutoImageProcessor.from_pretrained("both")' in card

def test_processors_that_differ_stay_with_their_tasks(folders, tmp_path):
    grey(.1).save_pretrained(folders['b'])
    with pytest.warns(UserWarning, match='preprocessor_config.json is not the same'): merged = merge(folders, method='average', **QUIET)
    assert merged.tokenizer is None and [list(o.image_mean) for o in merged.tokenizers.values()]==[[.4], [.1]]
    merged.save_pretrained(tmp_path/'both')
    again = Merged.from_pretrained(tmp_path/'both')
    assert again.tokenizer is None and [list(o.image_mean) for o in again.tokenizers.values()]==[[.4], [.1]]

def test_what_a_model_takes_decides_what_is_read_beside_it(tmp_path):
    "A CLIP has a tokenizer too; a Whisper that writes is kept with its tokenizer."
    text = dict(**SIZE, vocab_size=60, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    CLIPForImageClassification(CLIPConfig(text_config=text, vision_config=SIZE | dict(image_size=8, patch_size=4), num_labels=2)).save_pretrained(tmp_path/'clip')
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    WhisperForConditionalGeneration(WhisperConfig(vocab_size=60, **small, max_source_positions=10, max_target_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                                  decoder_start_token_id=1)).save_pretrained(tmp_path/'whisper')
    for o in ('clip', 'whisper'):
        words.tokenizer().save_pretrained(tmp_path/o)
        grey().save_pretrained(tmp_path/o)
    assert list(load_tokenizer(tmp_path/'clip').image_mean)==[.4]
    assert 'a' in load_tokenizer(tmp_path/'whisper').get_vocab()

def test_sounds(tmp_path):
    torch.manual_seed(0)
    model, extractor = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SOUND, num_labels=2)).eval(), Wav2Vec2FeatureExtractor(do_normalize=True)
    model.save_pretrained(tmp_path/'a')
    extractor.save_pretrained(tmp_path/'a')
    samples = [(3*np.random.RandomState(i).randn(400)+1).astype(np.float32) for i in range(4)]
    rows = Dataset.from_dict(dict(audio=[o.tolist() for o in samples], label=[0, 1, 0, 1]))
    normal = [((o-o.mean())/math.sqrt(o.var()+1e-7)).tolist() for o in samples]
    want = mask_fisher(model, Dataset.from_dict(dict(input_values=normal, labels=[0, 1, 0, 1])), **QUIET)
    assert_close(mask_fisher(tmp_path/'a', rows, **QUIET).heads, want.heads, rtol=1e-3, atol=0)
    merged = merge(dict(a=tmp_path/'a', b=tmp_path/'a'), method='average', **QUIET)
    merged.save_pretrained(tmp_path/'both')
    assert AutoFeatureExtractor.from_pretrained(tmp_path/'both').do_normalize
    assert 'processor = AutoFeatureExtractor' in (tmp_path/'both'/'README.md').read_text()

def test_what_is_wrong_with_pictures_is_said(folders):
    numbers, rows = pictures()
    say = "the data set has no `pixel_values`, only .'image', 'label'.; give what reads them, the processor of the model, as `tokenizer=`"
    with pytest.raises(ValueError, match=say): mask_fisher(vit(), rows, **QUIET)
    with pytest.raises(ValueError, match="data of 'a': the data set has no `pixel_values`"): merge({t: vit() for t in 'ab'}, data=dict.fromkeys('ab', rows), **QUIET)
    images = rows['image'][:]
    types = Features(dict(image=Image(), label=Value('int64')))
    for i, odd, say in [(3, None, 'the image of row 3 cannot be read: '), (2, images[2].convert('RGB'), r'the image of row 2 cannot be read: .*mean must have')]:
        wrong = Dataset.from_dict(dict(image=[odd if j==i else o for j, o in enumerate(images)], label=[0]*7), types)
        with pytest.raises(ValueError, match=say): evaluate(folders['a'], wrong, **QUIET)
    (folders['a']/'preprocessor_config.json').unlink()
    with pytest.raises(ValueError, match='a has no processor; give it as `tokenizer=`'): evaluate(folders['a'], rows, **QUIET)
    (folders['b']/'preprocessor_config.json').write_text(json.dumps(dict(image_processor_type='NoSuch')))
    with pytest.raises(ValueError, match='cannot load .*b: '): evaluate(folders['b'], rows, **QUIET)
    with pytest.raises(TypeError, match='`tokenizer` must be a tokenizer of transformers, got ViTForImageClassification'): merge(folders, method='average', tokenizer=vit(), **QUIET)

def test_language_models_become_one_and_their_card_says_so(tmp_path):
    def writer(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=60, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    merged = merge(dict(a=writer(0), b=writer(1)), method='average', **QUIET)
    assert merged['a'] is merged['b']
    merged.save_pretrained(tmp_path/'both')
    card = (tmp_path/'both'/'README.md').read_text()
    assert 'All tasks are answered by one model: this folder has the same weights' in card and 'logits(**batch)' not in card
    ids = torch.tensor([[5, 6, 7]])
    loaded = [LlamaForCausalLM.from_pretrained(o) for o in (tmp_path/'both', tmp_path/'both'/'a', tmp_path/'both'/'b')]
    for o in loaded: assert torch.equal(o(ids).logits, merged['a'](ids).logits)
    with pytest.raises(ValueError, match="have no task head of their own; ask one of them, as `merged.'a'."): merged.logits(input_ids=ids)

def test_files_of_rows_are_scored_as_the_rows(folders, tmp_path):
    "Of images, whose file names no classes, and of pairs, which have numbers."
    rows = pictures()[1]
    rows.to_parquet(tmp_path/'rows.parquet')
    data, task = load_rows(tmp_path/'rows.parquet', folders['a'])
    assert evaluate(folders['a'], data, task, **QUIET)==evaluate(folders['a'], rows, **QUIET)
    torch.manual_seed(0)
    body = BertModel(BertConfig(**SIZE, vocab_size=10, max_position_embeddings=20)).eval()
    pairs = Dataset.from_dict(dict(sentence1=['a b', 'c', 'd e a'], sentence2=['b', 'c c', 'e'], score=[.1, .9, .4]))
    pairs.to_json(tmp_path/'pairs.jsonl')
    data, task = load_rows(tmp_path/'pairs.jsonl', body)
    how = dict(tokenizer=words.tokenizer(), **QUIET)
    assert evaluate(body, data, task, **how)==evaluate(body, pairs, **how)
    assert [*evaluate(body, data, task, **how)]==['pearson']
