"""Generation: one token after another from a language model, as fast as the memory's bandwidth allows.

cache: keys and values of the tokens so far, and what of them fits. attention: attention over them. layer: a
decoder block as a function that reads and writes them, made from the block's own graph. sampling: the next
token from logits. prompts: in which chunks they go through, and how those multiply. decoder: a whole model
with its cache; a prompt in chunks, then one step a token, a CUDA graph on a GPU. text: tokens into text that
can be shown, up to a stop string. generator: all of it, for prompts.
"""
