"""Heat maps: what an answer's tokens attended to in the pictures, as numbers and as pictures.

`maps` has the numbers, `geometry` where an image token lies in its picture, `drawing` and `sheet`
make pictures of them.
"""
