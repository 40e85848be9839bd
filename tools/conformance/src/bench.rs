use std::ffi::CStr;
#[derive(clap::Args, Debug)]
pub struct Options {}
pub fn run(_: &Options, _: &CStr) {}
