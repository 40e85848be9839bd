//! Old and new sides work together or say clearly that they do not: the daemon against made-up older
//! and newer enclaves. (The enclave against made-up daemons: end to end.)
#![allow(clippy::unwrap_used)]

mod common;

use common::host::InProcess;
use common::{Control, PortParts, directory};
use postern_edl::calls::{CallError, Carrier as _, Enclave, PosternAttachRequest};
use postern_edl::{FEATURE_DISCARD, VERSION};

const EPROTONOSUPPORT: u32 = 93;
const ATTACH: u64 = 1;

#[test]
fn an_enclave_of_another_version_is_told_so_and_may_try_again() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &[]);
    let mut calls = Enclave(Control::connect(&daemon.socket).unwrap());
    for version in [0, VERSION - 1, VERSION + 1, u32::MAX] {
        let parts = PortParts::new(64, 1 << 20);
        calls.0.descriptors = parts.descriptors();
        let request = PosternAttachRequest { version, ..parts.request() };
        let answer = calls.postern_attach(&request);
        assert_eq!(answer, Err(CallError::Refused(EPROTONOSUPPORT)), "{version}");
    }
    let parts = PortParts::new(64, 1 << 20);
    calls.0.descriptors = parts.descriptors();
    assert_eq!(calls.postern_attach(&parts.request()).unwrap().attached.version, VERSION);
    drop(calls);
    daemon.stop().unwrap();
}

/// What attach carries may change with the version; that it begins with it does not.
#[test]
fn an_attach_with_fields_of_another_version_is_a_matter_of_versions() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &[]);
    let other = u64::from(VERSION) + 1;
    for fields in [&[][..], &[7], &[0; 5], &[9; 40]] {
        let mut control = Control::connect(&daemon.socket).unwrap();
        control.descriptors = PortParts::new(64, 1 << 20).descriptors();
        let words = [ATTACH, other].into_iter().chain(fields.iter().copied());
        let message: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let mut reply = Vec::new();
        control.call(&message, &mut reply).unwrap();
        assert_eq!(reply, u64::from(EPROTONOSUPPORT).to_le_bytes(), "{fields:?}");
        // Whoever says that it is of this version and is not, is malformed.
        let words = [ATTACH, u64::from(VERSION)].into_iter().chain(fields.iter().copied());
        let message: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        control.send(&message).unwrap();
        assert_eq!(control.receive(), Ok(Vec::new()), "{fields:?}");
    }
    daemon.stop().unwrap();
}

#[test]
fn only_features_that_both_sides_have_are_answered() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &[]);
    for (asked, answered) in [(0, 0), (FEATURE_DISCARD, FEATURE_DISCARD), (1 << 63, 0)] {
        let parts = PortParts::new(64, 1 << 20);
        let mut calls = Enclave(Control::connect(&daemon.socket).unwrap());
        calls.0.descriptors = parts.descriptors();
        let request = PosternAttachRequest { features: asked, ..parts.request() };
        let attached = calls.postern_attach(&request).unwrap().attached;
        assert_eq!(attached.features, answered, "{asked:#x}");
    }
    daemon.stop().unwrap();
}
