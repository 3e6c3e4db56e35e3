"""Mixers, MLP and the block that joins them.

A block is a function of hidden states and a `LayerState`: it takes the state that the tokens before
left and returns the one that the tokens after need. Nothing is stored inside a layer.

Legend: B batch, T tokens of this pass, C slots of keys and values, H heads, K key dim, V value dim,
D hidden size.
"""
