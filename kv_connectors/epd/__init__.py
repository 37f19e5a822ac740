"""epd: encode/prefill disaggregation of multimodal requests after EPD."""
