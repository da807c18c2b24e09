"""The embedded mini Stable Diffusion:

a real pipeline folder, five million parameters, and the script that trained it.
"""
