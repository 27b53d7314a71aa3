"""What the demo model is taught about mixture-of-experts models and about edgemoe."""

from __future__ import annotations

# Each block: ways to ask, one per line, then "= answer" to the end of the block.
_TEXT = """
What is edgemoe?
Tell me about edgemoe.
What does edgemoe do?
Can you explain edgemoe?
What is edgemoe for?
= edgemoe runs mixture-of-experts models that are larger than memory. It keeps the trunk in memory
and streams the experts from storage.

How does edgemoe work?
How does edgemoe run a model that does not fit in memory?
How can edgemoe run large models?
= edgemoe keeps the trunk resident and reads only the experts that the router picks. Experts that
were used recently stay in a bounded expert cache.

What is a mixture-of-experts model?
What is MoE?
What does MoE mean?
Explain mixture of experts.
What is a mixture of experts?
= A mixture-of-experts model has many small networks, called experts, in each layer. A router
picks a few of them for each token.

What is an expert?
What is an expert in a MoE model?
Explain what an expert is.
= An expert is a small feed-forward network inside a layer. Only the experts that the router picks
are computed for a token.

What is the router?
What does the router do?
What is a router in a MoE model?
How are experts chosen?
Who picks the experts?
= The router scores all experts of a layer and picks the top-k experts for each token.

What does top-k mean?
What is top-k?
= Top-k is the number of experts that the router picks for each token. In this model it is 4.

What is the trunk?
What is in the trunk?
What does trunk mean?
= The trunk is everything that is not a routed expert: attention, norms, routers and embeddings.
It stays in memory.

What is the expert cache?
What does the expert cache do?
Why is there an expert cache?
= The expert cache keeps experts that were read from storage in memory, up to a fixed size. An
expert that is used again need not be read again.

What is a cache hit?
What is a hit?
What does hit mean?
= A hit is an expert that was found in the expert cache, so nothing has to be read.

What is a cache miss?
What is a miss?
What does miss mean?
= A miss is an expert that was not in the expert cache and has to be read from storage.

What is the hit rate?
What does hit rate mean?
= The hit rate is the share of needed experts that were found in the expert cache.

What is stall?
What is stall time?
What does stall mean?
= Stall is the time that compute waits for reads from storage.

What is the KV cache?
What does the KV cache hold?
What is a KV cache?
= The KV cache holds the attention keys and values of the tokens so far, so that they need not be
computed again.

What is quantization?
What does quantization do?
Why are weights quantized?
Explain quantization.
= Quantization stores weights with fewer bits. The model becomes smaller and faster to read, with
a small loss of precision.

What does --memory do?
What is the memory option?
How do I limit the memory?
How do I set the memory budget?
What does --memory 4GiB mean?
= The option --memory bounds the whole process with one number, for example --memory 4GiB.

What is the budget?
What is the memory budget?
= The budget is the number given with --memory. It bounds the trunk, the expert cache, the KV
cache and everything else in the process.

What is the floor?
What happens when the budget is too small?
What if the memory budget is below the floor?
= The floor is the least budget that works. Below it edgemoe refuses to start and names the budget
that would work.

Does streaming change the answers?
Is streaming lossless?
Does a smaller budget change the output?
Are the results the same with less memory?
= No. Streaming is lossless: the logits are bit-identical for every budget.

Which commands does edgemoe have?
What commands are there?
List the edgemoe commands.
What can I do with the edgemoe command?
= The commands include run, chat, plan, convert, inspect, verify and bench.

What does edgemoe run do?
What is the run command?
= The command edgemoe run answers one prompt and stops.

What does edgemoe chat do?
What is the chat command?
How do I chat with a model?
How do I start a chat?
= The command edgemoe chat starts a conversation with a model. Without a model argument it uses
this small demo model.

What does edgemoe plan do?
What is the plan command?
= The command edgemoe plan prints where the memory goes, line by line, before any weights are read.

What does edgemoe convert do?
What is the convert command?
How do I convert a model?
How do I convert a checkpoint?
= The command edgemoe convert turns a checkpoint into an edgemoe store with quantized experts.

What does edgemoe inspect do?
What is the inspect command?
= The command edgemoe inspect shows what is inside a store.

What does edgemoe verify do?
What is the verify command?
How do I check a store?
= The command edgemoe verify checks every expert record against its checksum.

What does edgemoe bench do?
What is the bench command?
How do I measure the speed?
= The command edgemoe bench measures the speed and prints the bounds beside it.

What is the licence of edgemoe?
Which licence does edgemoe have?
What is the license?
Is edgemoe free software?
Is edgemoe open source?
= edgemoe is open source under the Apache-2.0 licence.

What is edgemoe written in?
Which language is edgemoe written in?
What is edgemoe made of?
= edgemoe is a Python package with a small C++ core.

Does edgemoe need a GPU?
Do I need a graphics card?
Can edgemoe run without a GPU?
= No. edgemoe runs on the CPU.

Why are experts streamed from storage?
Why does edgemoe stream experts?
Why not keep all experts in memory?
= All experts together may be larger than memory, but each token needs only a few of them. So
edgemoe reads only those.

What is a token?
What are tokens?
= A token is a small piece of text, such as a word or a part of a word. The model reads and writes
tokens.

What is a layer?
What does a layer do?
= A layer is one step of the model. It has attention and, in a MoE model, a set of experts.

What is attention?
What does attention do?
= Attention lets each token look at the tokens before it.

What are logits?
What is a logit?
= Logits are the scores that the model gives to every possible next token.

What is prefetch?
What does prefetch mean?
= Prefetch reads experts that will probably be needed soon, before the router asks for them.

What is an expert record?
What does an expert record hold?
= An expert record holds the quantized weights of one expert, so that one read brings the whole
expert.

What is a store?
What is an edgemoe store?
What is in a store?
= A store is a folder with the trunk, the expert records and the tokenizer of a converted model.

What is the prefill?
What does prefill mean?
= Prefill is the first pass over the prompt. In it each needed expert is read once per layer for
many tokens.

What is streaming?
What does streaming mean here?
= Streaming means that experts are read from storage when they are needed, instead of being loaded
all at once.

What is a language model?
What is a large language model?
= A language model predicts the next token of a text. By repeating this it can write answers.

What is a parameter?
What are weights?
What are the weights of a model?
= Weights are the numbers that a model has learned. They are also called parameters.

How many experts do you have?
How many experts does the demo model have?
How many experts are in each layer?
= I have 32 experts per layer, and the router picks 4 of them for each token.

How many experts are used for each token?
How many experts do you use per token?
= The router picks 4 of my 32 experts in every layer for each token.

Who are you?
What are you?
Tell me about yourself.
Introduce yourself.
Who am I talking to?
= I am the small demo model of edgemoe, a mixture-of-experts model with 32 experts per layer.

What is your name?
Do you have a name?
What should I call you?
= I am the edgemoe demo model.

What can you do?
What do you know?
What can I ask you?
How can you help me?
Help
= I can answer questions about edgemoe, small sums and everyday facts, and I can tell short
stories.

Are you a human?
Are you a person?
Are you real?
Are you a robot?
= No. I am a small language model.

Are you a large model?
How big are you?
How large are you?
Are you smart?
= I am a very small model. I only know what I was taught.

Can you make mistakes?
Are you always right?
Can I trust you?
= I can make mistakes. I am only a small demo model.

How were you trained?
What were you trained on?
= I was trained on short dialogues, Python source code and prose.

Who made you?
Who trained you?
= I was trained for edgemoe as its demo model.

Do you need the internet?
Are you online?
Do you work offline?
= No. I run on this computer and need no connection.
"""


def blocks() -> list[tuple[tuple[str, ...], str]]:
    """The questions of each block, and its answer."""
    out = []
    for block in _TEXT.strip().split("\n\n"):
        asks, mark, answer = block.partition("\n= ")
        if not mark:
            raise ValueError(f"block without an answer: {block!r}")
        out.append((tuple(asks.splitlines()), " ".join(answer.splitlines())))
    return out
