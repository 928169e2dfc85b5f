"""Compares methods: every method × learning rate × seed on one stream, under one budget.

python -m sdft compare --config configs/compare_quick.yaml
"""
