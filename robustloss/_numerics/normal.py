"""Constants of the standard normal distribution, Phi being its distribution function."""

UPPER_QUARTILE = 0.6744897501960817
"""Phi^-1(3/4), the median of the absolute value"""
MAD = 1.4826022185056018
"""1 / Phi^-1(3/4), which makes the median absolute deviation consistent"""
IQR = 0.7413011092528009
"""1 / (2 Phi^-1(3/4)), which makes the interquartile range consistent"""
TWO_SIDED_95 = 1.9599639845400543
"""Phi^-1(0.975)"""
