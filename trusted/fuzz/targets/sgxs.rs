#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sgx_image::fuzz::sgxs(data));
