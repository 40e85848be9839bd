//! The boundary's EDL file to Rust: a parser for the grammar of the SGX SDK and a generator.
//!
//! [`parse`] accepts what the SDK's `sgx_edger8r` accepts: what passes it can go to that tool too.
//! [`generate`] turns an interface into the request and reply types, the host's trait and dispatch,
//! and the enclave's calls; it carries less than EDL can say and refuses the rest by name. The
//! generated text is `no_std` with `alloc`, has no `unsafe`, and stands on the boundary crate's
//! `wire` module.
//!
//! Holds for any input: no panic, an end, and a refusal that says where, what, and what to do.
//! Does not hold: that a C header has the types that an `include` promises; headers are not read.
//!
//! Follows the Enclave Definition Language as the SGX Developer Reference describes it.
#![forbid(unsafe_code)]

pub mod ast;
mod check;
mod declaration;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod lexer;
mod model;
mod names;
mod parser;
mod rust;

pub use error::{Error, Position};

use ast::{Base, Declaration, Interface};
use std::collections::BTreeMap;

/// Parses an EDL file and checks it as `sgx_edger8r` does. `file` is its name in errors.
///
/// # Errors
/// The first place where the file breaks the grammar or a rule.
pub fn parse(file: &str, source: &str) -> Result<Interface, Error> {
    let interface = lexer::tokens(source).and_then(parser::parse).and_then(|mut interface| {
        resolve(&mut interface);
        check::check(&interface)?;
        Ok(interface)
    });
    interface.map_err(|fault| fault.in_file(file))
}

/// Generates the boundary code of an EDL file. `file` is its name in errors and in the code.
///
/// # Errors
/// As [`parse`], and for what EDL can say and the generator does not carry.
pub fn generate(file: &str, source: &str) -> Result<String, Error> {
    let interface = parse(file, source)?;
    let model = model::model(&interface).map_err(|fault| fault.in_file(file))?;
    let name = file.rsplit('/').next().unwrap_or(file);
    rust::text(&model, name, &interface.to_string()).map_err(|_| Error {
        file: file.to_owned(),
        at: Position::default(),
        what: "the generated text could not be written".to_owned(),
        remedy: "free some memory".to_owned(),
    })
}

/// FNV-1a of the interface's normal form: the same for two files that differ in comments, blanks
/// and spelling of types only.
#[must_use]
pub fn fingerprint(interface: &Interface) -> u64 {
    rust::fingerprint(&interface.to_string())
}

/// Gives bare names that are tags of this file their keyword: `file_t` means `struct file_t`.
fn resolve(interface: &mut Interface) {
    let tags: BTreeMap<String, ast::Keyword> = interface
        .composites
        .iter()
        .filter_map(|composite| composite.name.clone().map(|name| (name, composite.keyword)))
        .collect();
    let tagged = |it: &mut Declaration| {
        if let Base::Named(name) = &it.base
            && let Some(keyword) = tags.get(name)
        {
            it.base = Base::Tagged(*keyword, name.clone());
        }
    };
    for composite in &mut interface.composites {
        composite.members.iter_mut().for_each(tagged);
    }
    for function in interface.trusted.iter_mut().chain(&mut interface.untrusted) {
        tagged(&mut function.returns);
        function.parameters.iter_mut().for_each(tagged);
    }
}
