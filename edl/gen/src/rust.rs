//! The model as Rust text. What it says of the wire is in the boundary crate's `wire` module.

use crate::model::{Call, Carried, Field, Limit, Model, Switchless, Type};
use crate::names;
use core::fmt::{self, Write};

/// The whole generated file.
pub(crate) fn text(model: &Model, origin: &str, normal: &str) -> Result<String, fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "// Generated from {origin} by postern-edl-gen. Change that file, not this one.\n"
    )?;
    writeln!(out, "use crate::wire::{{Reader, Wire, Writer}};")?;
    writeln!(out, "use alloc::{{string::String, vec::Vec}};\n")?;
    writeln!(out, "pub use crate::wire::{{CallError, Carrier, Malformed}};\n")?;
    writeln!(
        out,
        "/// FNV-1a of the interface's normal form. Equal on both sides if and only if (collisions"
    )?;
    writeln!(
        out,
        "/// aside) they were built from the same interface; no protection against a forger."
    )?;
    writeln!(out, "pub const FINGERPRINT: u64 = {:#018x};\n", fingerprint(normal))?;
    for it in &model.types {
        composite(&mut out, it)?;
    }
    for call in &model.calls {
        messages(&mut out, call)?;
    }
    request(&mut out, model)?;
    host(&mut out, model)?;
    dispatch(&mut out, model)?;
    enclave(&mut out, model)?;
    if !model.switchless.is_empty() {
        switchless(&mut out, &model.switchless)?;
    }
    Ok(out)
}

/// 64-bit FNV-1a.
pub(crate) fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn doc(out: &mut String, indent: &str, comment: &str, otherwise: &str) -> fmt::Result {
    let text = if comment.is_empty() { otherwise.to_owned() } else { names::rustdoc(comment) };
    for line in text.lines() {
        writeln!(out, "{}", format!("{indent}/// {line}").trim_end())?;
    }
    Ok(())
}

fn rust_type(carried: &Carried) -> String {
    match carried {
        Carried::Value(name) => name.clone(),
        Carried::Address => "u64".to_owned(),
        Carried::Text => "String".to_owned(),
        Carried::Input { element, .. } | Carried::Output { element, .. } => {
            format!("Vec<{element}>")
        }
    }
}

fn structure(out: &mut String, name: &str, of: &str, fields: &[Field]) -> fmt::Result {
    writeln!(out, "#[derive(Clone, Debug, Default, PartialEq, Eq)]")?;
    if fields.is_empty() {
        return writeln!(out, "pub struct {name};\n");
    }
    writeln!(out, "pub struct {name} {{")?;
    for field in fields {
        doc(out, "    ", &field.doc, &format!("`{}` of `{of}`.", field.plain))?;
        match &field.carried {
            Carried::Address => {
                writeln!(
                    out,
                    "    ///\n    /// An address; the memory itself is not in the message."
                )?;
            }
            Carried::Output { limit, .. } => {
                let limit = match limit {
                    Limit::Value(name) => format!("the request's `{name}`"),
                    Limit::Length(name) => format!("the request's `{name}` is long"),
                };
                writeln!(out, "    ///\n    /// At most as many elements as {limit}.")?;
            }
            _ => {}
        }
        writeln!(out, "    pub {}: {},", field.name, rust_type(&field.carried))?;
    }
    writeln!(out, "}}\n")
}

fn composite(out: &mut String, it: &Type) -> fmt::Result {
    match it {
        Type::Struct { name, doc: comment, fields } => {
            doc(out, "", comment, "A struct of the interface.")?;
            structure(out, name, name, fields)?;
            writeln!(out, "impl Wire for {name} {{")?;
            writeln!(out, "    fn put(&self, writer: &mut Writer<'_>) {{")?;
            for field in fields {
                writeln!(out, "        self.{}.put(writer);", field.name)?;
            }
            writeln!(out, "    }}\n")?;
            writeln!(out, "    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {{")?;
            writeln!(out, "        Ok(Self {{")?;
            for field in fields {
                writeln!(out, "            {}: Wire::get(reader)?,", field.name)?;
            }
            writeln!(out, "        }})\n    }}\n}}\n")
        }
        Type::Enum { name, doc: comment, variants } => {
            doc(out, "", comment, "An enum of the interface.")?;
            writeln!(out, "#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]")?;
            writeln!(out, "#[repr(u32)]\npub enum {name} {{")?;
            for (n, variant) in variants.iter().enumerate() {
                doc(out, "    ", &variant.doc, &format!("Number {}.", variant.value))?;
                if n == 0 {
                    writeln!(out, "    #[default]")?;
                }
                writeln!(out, "    {} = {},", variant.name, variant.value)?;
            }
            writeln!(out, "}}\n\nimpl Wire for {name} {{")?;
            writeln!(out, "    fn put(&self, writer: &mut Writer<'_>) {{")?;
            writeln!(out, "        (*self as u32).put(writer);\n    }}\n")?;
            writeln!(out, "    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {{")?;
            writeln!(
                out,
                "        let at = reader.position();\n        match u32::get(reader)? {{"
            )?;
            for variant in variants {
                writeln!(out, "            {} => Ok(Self::{}),", variant.value, variant.name)?;
            }
            writeln!(out, "            _ => Err(Malformed::Range {{ word: at }}),")?;
            writeln!(out, "        }}\n    }}\n}}\n")
        }
    }
}

fn messages(out: &mut String, call: &Call) -> fmt::Result {
    let (name, camel) = (&call.name, &call.camel);
    writeln!(out, "/// What [`Host::{name}`] is asked.")?;
    structure(out, &format!("{camel}Request"), name, &call.request)?;
    writeln!(out, "/// What [`Host::{name}`] answers.")?;
    structure(out, &format!("{camel}Reply"), name, &call.reply)
}

fn request(out: &mut String, model: &Model) -> fmt::Result {
    writeln!(out, "/// A request as it travels: its number, then its fields.")?;
    writeln!(out, "#[derive(Clone, Debug, PartialEq, Eq)]\npub enum Request {{")?;
    for (n, call) in model.calls.iter().enumerate() {
        writeln!(out, "    /// Call {}, `{}`.", n + 1, call.name)?;
        writeln!(out, "    {}({}Request),", call.camel, call.camel)?;
    }
    writeln!(out, "}}\n\nimpl Request {{")?;
    writeln!(out, "    /// Reads a whole request; `bytes` must hold it and nothing else.")?;
    writeln!(out, "    ///\n    /// # Errors")?;
    writeln!(out, "    /// [`Malformed`] for anything that [`Self::encode`] would not write.")?;
    writeln!(out, "    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {{")?;
    writeln!(out, "        let mut reader = Reader::new(bytes)?;")?;
    writeln!(out, "        let request = match u64::get(&mut reader)? {{")?;
    for (n, call) in model.calls.iter().enumerate() {
        let camel = &call.camel;
        write!(out, "            {} => Self::{camel}({camel}Request", n + 1)?;
        if !call.request.is_empty() {
            writeln!(out, " {{")?;
            for field in &call.request {
                writeln!(out, "                {}: {},", field.name, getter(field))?;
            }
            write!(out, "            }}")?;
        }
        writeln!(out, "),")?;
    }
    writeln!(out, "            call => return Err(Malformed::UnknownCall {{ call }}),")?;
    writeln!(out, "        }};\n        reader.end()?;\n        Ok(request)\n    }}\n")?;
    writeln!(out, "    /// Writes the request in place of what `bytes` held.")?;
    writeln!(out, "    ///\n    /// # Errors")?;
    writeln!(
        out,
        "    /// [`Malformed`] for a text with a NUL inside or a buffer longer than its length"
    )?;
    writeln!(out, "    /// parameter can say; `bytes` is then of no use.")?;
    writeln!(out, "    pub fn encode(&self, bytes: &mut Vec<u8>) -> Result<(), Malformed> {{")?;
    writeln!(out, "        let mut writer = Writer::new(bytes);\n        match self {{")?;
    for (n, call) in model.calls.iter().enumerate() {
        let binding = if call.request.is_empty() { "_" } else { "request" };
        writeln!(out, "            Self::{}({binding}) => {{", call.camel)?;
        writeln!(out, "                {}_u64.put(&mut writer);", n + 1)?;
        for field in &call.request {
            writeln!(out, "                {};", setter("request", field))?;
        }
        writeln!(out, "            }}")?;
    }
    writeln!(out, "        }}\n        writer.end()\n    }}\n}}\n")
}

/// An expression that reads `field`; in a reply the limit is the local `limit_NAME`.
fn getter(field: &Field) -> String {
    match &field.carried {
        Carried::Value(_) | Carried::Address => "Wire::get(&mut reader)?".to_owned(),
        Carried::Text => "reader.text()?".to_owned(),
        Carried::Input { element, limit } => {
            format!("reader.{}({})?", plural(element), number(*limit))
        }
        Carried::Output { element, .. } => {
            format!("reader.{}(limit_{})?", plural(element), field.plain)
        }
    }
}

fn setter(from: &str, field: &Field) -> String {
    let name = &field.name;
    match &field.carried {
        Carried::Value(_) | Carried::Address => format!("{from}.{name}.put(&mut writer)"),
        Carried::Text => format!("writer.text(&{from}.{name})"),
        Carried::Input { element, limit } => {
            format!("writer.{}(&{from}.{name}, {})", plural(element), number(*limit))
        }
        Carried::Output { element, .. } => {
            format!("writer.{}(&{from}.{name}, limit_{})", plural(element), field.plain)
        }
    }
}

fn number(limit: u64) -> String {
    if limit == u64::MAX { "u64::MAX".to_owned() } else { limit.to_string() }
}

fn plural(element: &str) -> &'static str {
    if element == "u8" { "bytes" } else { "values" }
}

/// Locals that keep the limits of a reply while the request is away.
fn limits(out: &mut String, indent: &str, call: &Call) -> fmt::Result {
    for field in &call.reply {
        if let Carried::Output { limit, .. } = &field.carried {
            let value = match limit {
                Limit::Value(name) => {
                    let wide = call.request.iter().any(|length| {
                        length.name == *name
                            && matches!(&length.carried, Carried::Value(ty) if ty == "u64")
                    });
                    if wide {
                        format!("request.{name}")
                    } else {
                        format!("u64::from(request.{name})")
                    }
                }
                Limit::Length(name) => format!("request.{name}.len() as u64"),
            };
            writeln!(out, "{indent}let limit_{} = {value};", field.plain)?;
        }
    }
    Ok(())
}

fn host(out: &mut String, model: &Model) -> fmt::Result {
    writeln!(out, "/// The untrusted side: what a daemon does for an enclave.")?;
    writeln!(
        out,
        "///\n/// An error is a Linux errno, 1..=4095. Requests are well-formed and otherwise unchecked:"
    )?;
    writeln!(out, "/// a length asked for can be any number, a handle or an address anything.")?;
    writeln!(out, "pub trait Host {{")?;
    for (n, call) in model.calls.iter().enumerate() {
        if n > 0 {
            writeln!(out)?;
        }
        doc(out, "    ", &call.doc, &format!("Call `{}`.", call.name))?;
        writeln!(out, "    fn {}(", call.method)?;
        writeln!(out, "        &mut self,\n        request: {}Request,", call.camel)?;
        writeln!(out, "    ) -> impl Future<Output = Result<{}Reply, u32>> + Send;", call.camel)?;
    }
    writeln!(out, "}}\n")
}

fn dispatch(out: &mut String, model: &Model) -> fmt::Result {
    writeln!(
        out,
        "/// Decodes a request, calls the host, and writes the answer in place of what `reply` held."
    )?;
    writeln!(
        out,
        "///\n/// A host that answers more than was asked for, or an errno out of range, is a fault of"
    )?;
    writeln!(out, "/// the host's: the enclave is told EOVERFLOW or EIO.")?;
    writeln!(out, "///\n/// # Errors")?;
    writeln!(
        out,
        "/// [`Malformed`] if `request` is none: the host was not called and `reply` is empty."
    )?;
    writeln!(out, "pub async fn dispatch<H: Host + Send>(")?;
    writeln!(out, "    host: &mut H,\n    request: &[u8],\n    reply: &mut Vec<u8>,")?;
    writeln!(out, ") -> Result<(), Malformed> {{\n    reply.clear();")?;
    if model.calls.is_empty() {
        writeln!(out, "    let _ = host;")?;
    }
    writeln!(out, "    match Request::decode(request)? {{")?;
    for call in &model.calls {
        writeln!(out, "        Request::{}(request) => {{", call.camel)?;
        limits(out, "            ", call)?;
        writeln!(out, "            match host.{}(request).await {{", call.method)?;
        if call.reply.is_empty() {
            writeln!(
                out,
                "                Ok({}Reply) => Writer::reply(reply).end_reply(),",
                call.camel
            )?;
        } else {
            writeln!(out, "                Ok(answer) => {{")?;
            writeln!(out, "                    let mut writer = Writer::reply(reply);")?;
            for field in &call.reply {
                writeln!(out, "                    {};", setter("answer", field))?;
            }
            writeln!(out, "                    writer.end_reply();\n                }}")?;
        }
        writeln!(out, "                Err(errno) => Writer::refusal(reply, errno),")?;
        writeln!(out, "            }}\n        }}")?;
    }
    writeln!(out, "    }}\n    Ok(())\n}}\n")
}

fn enclave(out: &mut String, model: &Model) -> fmt::Result {
    writeln!(out, "/// The trusted side: the calls, over any carrier.")?;
    writeln!(
        out,
        "///\n/// Holds whatever the host answers: no panic, no more memory than the answer is long, and"
    )?;
    writeln!(out, "/// no buffer longer than was asked for. Values are claims of the host.")?;
    writeln!(out, "#[derive(Clone, Debug)]\npub struct Enclave<C>(pub C);\n")?;
    writeln!(out, "impl<C: Carrier> Enclave<C> {{")?;
    for (n, call) in model.calls.iter().enumerate() {
        if n > 0 {
            writeln!(out)?;
        }
        let camel = &call.camel;
        doc(out, "    ", &call.doc, &format!("Call `{}`.", call.name))?;
        writeln!(out, "    ///\n    /// # Errors")?;
        writeln!(
            out,
            "    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)"
        )?;
        writeln!(out, "    /// is malformed.")?;
        writeln!(out, "    pub fn {}(", call.method)?;
        writeln!(out, "        &mut self,\n        request: &{camel}Request,")?;
        writeln!(out, "    ) -> Result<{camel}Reply, CallError<C::Error>> {{")?;
        limits(out, "        ", call)?;
        writeln!(out, "        let (mut asked, mut answer) = (Vec::new(), Vec::new());")?;
        writeln!(out, "        Request::{camel}(request.clone()).encode(&mut asked)?;")?;
        writeln!(out, "        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;")?;
        let mutable = if call.reply.is_empty() { "" } else { "mut " };
        writeln!(out, "        let {mutable}reader = Reader::reply(&answer)?;")?;
        if call.reply.is_empty() {
            writeln!(out, "        reader.end()?;\n        Ok({camel}Reply)\n    }}")?;
            continue;
        }
        writeln!(out, "        let reply = {camel}Reply {{")?;
        for field in &call.reply {
            writeln!(out, "            {}: {},", field.name, getter(field))?;
        }
        writeln!(out, "        }};\n        reader.end()?;\n        Ok(reply)\n    }}")?;
    }
    writeln!(out, "}}")
}

/// The trait of the calls that make no message.
fn switchless(out: &mut String, calls: &[Switchless]) -> fmt::Result {
    writeln!(
        out,
        "\n/// The calls with `transition_using_threads`. No message is made of them: what runs the"
    )?;
    writeln!(
        out,
        "/// enclave serves them in its own process, without a transition where it has threads for it."
    )?;
    writeln!(
        out,
        "///\n/// Holds for their callers: an answer is a claim, and each may return early."
    )?;
    writeln!(out, "pub trait Switchless {{")?;
    for (n, call) in calls.iter().enumerate() {
        if n > 0 {
            writeln!(out)?;
        }
        doc(out, "    ", &call.doc, &format!("Call `{}`.", call.method))?;
        for field in call.parameters.iter().filter(|field| !field.doc.is_empty()) {
            writeln!(out, "    ///")?;
            doc(out, "    ", &format!("`{}`: {}", field.plain, field.doc), "")?;
        }
        writeln!(out, "    ///\n    /// # Errors\n    /// A Linux errno, 1..=4095.")?;
        writeln!(out, "    fn {}(", call.method)?;
        writeln!(out, "        &self,")?;
        for field in &call.parameters {
            writeln!(out, "        {}: {},", field.name, rust_type(&field.carried))?;
        }
        writeln!(out, "    ) -> Result<(), u32>;")?;
    }
    writeln!(out, "}}")
}
