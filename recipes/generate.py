"""Load a student or an adapter from a folder, as anybody would, and let it continue a text.

Command:   .venv/bin/python recipes/generate.py outputs/quickstart "The film was"
Hardware:  any. Minutes: less than one. Result: a continuation of 20 tokens.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


folder = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "The film was"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0], skip_special_tokens=True))
