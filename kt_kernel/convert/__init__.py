"""From a published checkpoint to one of 8-bit or 4-bit integers for the CPU (doc/converting.md).

targets       what is written: method, bits, columns that share a scale
source        the layers of the input, matrix by matrix, as numbers a few rows at a time
plain, coded, words, compressed   the ways in which an input stores them
quantise      rows of numbers -> codes and scales
layout        where each tensor of a shard lies, known before anything is read
shard         one shard, written under another name until it is whole
manifest      what the output folder says of itself; what makes it resumable
job           all layers, by several threads
progress      the bar
settings      the options of the command line, with those of older converters
compare       how far a converted checkpoint is from its original
"""
