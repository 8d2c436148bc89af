"""---
title: Changelog
---"""
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

text = (get_config().config_path/'CHANGELOG.md').read_text(encoding='utf-8')
print(NbdevLookup().linkify(text.partition('\n')[2]))
