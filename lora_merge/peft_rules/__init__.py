"""PEFT's own rules: its types and fields, targets, patterns, scales, and its layers one module at a time."""
