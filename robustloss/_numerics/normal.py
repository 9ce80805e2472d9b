"""Constants of the standard normal distribution, Phi being its distribution function."""

UPPER_QUARTILE = 0.6744897501960817
"""Phi^-1(3/4), the median of the absolute value"""
MAD = 1.482602218505602
"""1 / Phi^-1(3/4), which makes the median absolute deviation consistent"""
IQR = 0.741301109252801
"""1 / (2 Phi^-1(3/4)), which makes the interquartile range consistent"""
TWO_SIDED_95 = 1.959963984540054
"""Phi^-1(0.975)"""
