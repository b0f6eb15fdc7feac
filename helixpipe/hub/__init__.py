"""Hugging Face folders: architectures as data, weights in and out.

    config.json   ──► Architecture ──► ModelShape            architecture, entries, rope, window: no torch
    *.safetensors ──► Place of each parameter, checked       folder, headers: no torch
    a rank's part ──► its own slices, in its own precision   load
    a checkpoint  ──► a folder that transformers loads       export

Each architecture is one table (`llama`, `phi3`, `gemma`, `gpt2`, `modernbert`), read in both directions.
"""
