"""The built-in text of `bench` and `verify`: real prose, since random tokens make a cache look bad.

Random tokens touch every expert alike, so an expert cache hits exactly its own fraction of them.
"""

TEXT = """\
A lighthouse keeper is paid to notice small changes. The lamp must turn at one speed, the glass must
be clean, and the log must say what the sea looked like at every hour of the night. Nothing in the
log is exciting for years on end. Then one page is, and everybody wants to know what stood on the
pages before it. Good records are written by people who did not know which page would matter.

The same holds for a program that is measured. A run prints a number, and the number is compared
with another number from another day, and somebody draws a line between them. What was the machine
doing at that moment? Was the file already in memory? Which text was read, and how long was it? If
the log does not say, then the line is only a drawing. It is better to write down too much, and to
repeat each measurement until its spread is known.

Question: How does a river find its way to the sea?
Answer: It does not look for the sea at all. Water moves downhill wherever it can, and where it
cannot, it collects until the lowest edge gives way. A lake is a river that waits. Over a long time
the running water carries sand and stones along and cuts its own bed deeper, so that the way which
was only slightly lower at first becomes the only way there is.

Question: Why do bakers let the dough rest?
Answer: Flour and water make long chains of protein, and kneading pulls those chains tight. A tight
dough springs back and tears. When it rests, the chains relax, the yeast goes on making gas, and the
dough can be shaped without force. Half an hour is enough for a small loaf, and a night in the cold
gives a better taste.

def mean(values):
    \"\"\"The arithmetic mean of a sequence of numbers.\"\"\"
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

def median(values):
    \"\"\"The middle value; the mean of the two in the middle where the number is even.\"\"\"
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2

In the old harbour there was a chart room with a hundred drawers. A captain who sailed one coast for
all his life used three of them. The clerk, who was clever and had a bad knee, kept those three open
on the table. When another captain came, the clerk watched which charts he asked for first, and
while the man was still talking about the weather, the next chart was already on its way from the
far end of the room. Most days the clerk was right. When he was wrong, he lost nothing but a few
steps, because he never carried a chart away that somebody was reading.

A mixture of experts works in the same manner. Each layer of the network keeps many small networks,
and a router picks a few of them for each word. The ones not picked do no work at all, so that a
model can know a great deal and still answer quickly. What it cannot do is stay small: every expert
has to lie somewhere, ready to be called. If memory is too small for all of them, they lie on the
disk, and a cache keeps the ones that are likely to be asked for again. The router decides late, one
layer at a time, and the disk is slow compared with the processor. So the whole art is to keep the
right experts close, to ask for the missing ones early, and never to wait with idle hands.

There are 12 months in a year and 7 days in a week. If a train leaves at 9:40 and needs 85 minutes,
it arrives at 11:05. Three boxes with 24 bottles each hold 72 bottles; if 5 of them are broken, 67
are left. A square with sides of 6 metres has an area of 36 square metres and a fence of 24 metres.

She closed the book and looked out of the window. The snow had stopped, and a man with a dog was
walking slowly along the wall, leaving two lines of prints behind him. One line was straight. The
other went back and forth, stopped at every post, ran ahead and came back again. In the end both
arrived at the gate at the same time, and she thought that this was the best description of learning
she had ever seen, and that she would write it down before supper, and of course she forgot.
"""
