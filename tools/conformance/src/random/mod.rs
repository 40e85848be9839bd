use std::ffi::CStr;
#[derive(clap::Args, Debug)]
pub struct Choice {}
pub fn run(_: &Choice, _: &CStr, _: &CStr) {}
