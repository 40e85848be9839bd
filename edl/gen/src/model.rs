//! What of an interface this generator carries, in terms of the two messages of each call.
//!
//! A call's request holds what goes in, its reply what comes out; a pointer that is not copied
//! (`user_check`) is an address. Everything else that EDL can say is refused here, by name.

use crate::ast::{Amount, Base, Composite, Declaration, Function, Interface, Keyword};
use crate::error::{Fault, Position, refuse};
use crate::names;
use std::collections::{BTreeMap, BTreeSet};

/// Arrays above this have no `Default` in Rust.
const LONGEST_ARRAY: u64 = 32;

pub(crate) struct Model {
    pub types: Vec<Type>,
    pub calls: Vec<Call>,
    pub switchless: Vec<Switchless>,
}

pub(crate) enum Type {
    Struct { name: String, doc: String, fields: Vec<Field> },
    Enum { name: String, doc: String, variants: Vec<Variant> },
}

pub(crate) struct Variant {
    pub name: String,
    pub value: u32,
    pub doc: String,
}

pub(crate) struct Call {
    /// The EDL name, also the method's.
    pub name: String,
    pub method: String,
    /// What the request's and reply's names begin with.
    pub camel: String,
    pub doc: String,
    pub request: Vec<Field>,
    pub reply: Vec<Field>,
}

/// A call with `transition_using_threads`: no message is made of it.
pub(crate) struct Switchless {
    pub method: String,
    pub doc: String,
    pub parameters: Vec<Field>,
}

pub(crate) struct Field {
    pub name: String,
    /// The EDL name.
    pub plain: String,
    pub doc: String,
    pub carried: Carried,
}

pub(crate) enum Carried {
    /// One value: a Rust type that is `Wire`.
    Value(String),
    /// The address of memory that is not copied.
    Address,
    Text,
    /// A buffer. In a request, `limit` is the largest number its length parameter holds.
    Input {
        element: String,
        limit: u64,
    },
    /// In a reply: not longer than a length in the request.
    Output {
        element: String,
        limit: Limit,
    },
}

pub(crate) enum Limit {
    /// The value of this request field.
    Value(String),
    /// The length of this request field.
    Length(String),
}

struct Maker {
    /// EDL tags met so far, to Rust types.
    tags: BTreeMap<String, String>,
    /// Rust types met so far.
    types: BTreeSet<String>,
}

type Made<T> = Result<T, Fault>;

pub(crate) fn model(interface: &Interface) -> Made<Model> {
    if let Some((file, at)) = interface.includes.first() {
        return refuse(
            *at,
            format!("`include \"{file}\"`: C headers are not read"),
            "define the types in this file, out of types of stdint.h",
        );
    }
    if let Some(import) = interface.imports.first() {
        return refuse(
            import.at,
            format!("`from \"{}\" import`: other files are not read", import.file),
            "declare the functions in this file",
        );
    }
    if let Some(function) = interface.trusted.first() {
        return refuse(
            function.at,
            format!("`{}`: calls into the enclave are not carried", function.name),
            "keep trusted functions in an EDL file of the enclave's own that imports this one",
        );
    }
    let mut maker = Maker { tags: BTreeMap::new(), types: BTreeSet::new() };
    let mut types = Vec::new();
    let mut values = BTreeMap::new();
    for composite in &interface.composites {
        types.push(maker.composite(composite, &mut values)?);
    }
    let (mut calls, mut switchless) = (Vec::new(), Vec::new());
    for function in &interface.untrusted {
        answers_an_errno(function)?;
        if function.transition_using_threads {
            switchless.push(maker.switchless(function)?);
        } else {
            calls.push(maker.call(function)?);
        }
    }
    Ok(Model { types, calls, switchless })
}

/// What every call returns, and what none may have.
fn answers_an_errno(it: &Function) -> Made<()> {
    let returns = &it.returns;
    if returns.base != Base::Plain("uint32_t") || returns.pointers > 0 {
        let what = format!("`{}` does not return uint32_t", it.name);
        let remedy = "return uint32_t, 0 or an errno; hand values over by `[out]` parameters";
        return refuse(returns.at, what, remedy);
    }
    if it.propagate_errno {
        let what = format!("`propagate_errno` on `{}`", it.name);
        return refuse(it.at, what, "take it out: the returned value is the errno already");
    }
    if let Some((_, at)) = it.allow.first() {
        let remedy = "take it out: calls into the enclave are not carried";
        return refuse(*at, format!("`allow` on `{}`", it.name), remedy);
    }
    Ok(())
}

fn field_name(name: &str, at: Position) -> Made<String> {
    match names::field(name) {
        Some(field) => Ok(field),
        None => refuse(at, format!("`{name}` cannot be a name in Rust"), "choose another name"),
    }
}

impl Maker {
    fn type_name(&mut self, camel: String, of: &str, at: Position) -> Made<String> {
        if !names::free_type(&camel) || !self.types.insert(camel.clone()) {
            let what = format!("`{of}` would be `{camel}` in Rust, which is taken or no name");
            return refuse(at, what, "choose another name");
        }
        Ok(camel)
    }

    fn composite(&mut self, it: &Composite, values: &mut BTreeMap<String, u64>) -> Made<Type> {
        let Some(tag) = &it.name else {
            let remedy = "give it one, so that there is a type to carry";
            return refuse(it.at, "an enum without a name", remedy);
        };
        let name = self.type_name(names::camel(tag), tag, it.at)?;
        let doc = it.doc.clone();
        let made = match it.keyword {
            Keyword::Union => {
                let remedy = "use a struct: which member of a union counts is not in the message";
                return refuse(it.at, format!("`union {tag}` is not carried"), remedy);
            }
            Keyword::Struct => {
                let fields: Made<Vec<Field>> =
                    it.members.iter().map(|member| self.member(member)).collect();
                Type::Struct { name: name.clone(), doc, fields: fields? }
            }
            Keyword::Enum => {
                Type::Enum { name: name.clone(), doc, variants: variants(it, &name, values)? }
            }
        };
        // Known only from here on: a struct cannot hold itself.
        self.tags.insert(tag.clone(), name);
        Ok(made)
    }

    fn member(&self, it: &Declaration) -> Made<Field> {
        if it.pointers > 0 {
            let remedy = "pass what it points to as a parameter of its own";
            return refuse(it.at, format!("member `{}` is a pointer", it.name), remedy);
        }
        Ok(Field {
            name: field_name(&it.name, it.at)?,
            plain: it.name.clone(),
            doc: it.doc.clone(),
            carried: Carried::Value(self.array(it)?),
        })
    }

    /// The Rust type of a declaration without pointers.
    fn array(&self, it: &Declaration) -> Made<String> {
        let element = self.element(it)?;
        match it.bounds.as_slice() {
            [] => Ok(element),
            [bound] if *bound <= LONGEST_ARRAY => Ok(format!("[{element}; {bound}]")),
            [_] => refuse(
                it.at,
                format!("`{}` has more than {LONGEST_ARRAY} elements", it.name),
                "pass it as a pointer with a count that is a parameter",
            ),
            _ => refuse(
                it.at,
                format!("`{}` has more than one array bound", it.name),
                "use one bound, or an array of structs",
            ),
        }
    }

    /// The Rust type of one element.
    fn element(&self, it: &Declaration) -> Made<String> {
        let scalar = match &it.base {
            Base::Plain("char" | "unsigned char" | "uint8_t") => "u8",
            Base::Plain("int8_t") => "i8",
            Base::Plain("short" | "int16_t") => "i16",
            Base::Plain("unsigned short" | "uint16_t") => "u16",
            Base::Plain("int" | "int32_t") => "i32",
            Base::Plain("unsigned int" | "uint32_t") => "u32",
            Base::Plain("long" | "long long" | "int64_t") => "i64",
            Base::Plain("unsigned long" | "unsigned long long" | "uint64_t" | "size_t") => "u64",
            Base::Plain(other) => {
                let what = format!("`{}` is of type {other}, which is not carried", it.name);
                return refuse(it.at, what, "use an integer type of stdint.h");
            }
            Base::Tagged(_, tag) | Base::Named(tag) => {
                return match self.tags.get(tag) {
                    Some(name) => Ok(name.clone()),
                    None => refuse(
                        it.at,
                        format!("`{tag}` is used before its definition ends"),
                        "define it further up; a struct cannot hold itself",
                    ),
                };
            }
        };
        Ok(scalar.to_owned())
    }

    fn call(&mut self, it: &Function) -> Made<Call> {
        let camel = names::camel(&it.name);
        for message in ["Request", "Reply"] {
            self.type_name(format!("{camel}{message}"), &it.name, it.at)?;
        }
        // Once more alone: the variant of `Request`, which needs no type of that name.
        if camel == "Self" || !camel.starts_with(|c: char| c.is_ascii_alphabetic()) {
            let what = format!("`{}` has no name in Rust", it.name);
            return refuse(it.at, what, "begin it with a letter");
        }
        let (mut request, mut reply) = (Vec::new(), Vec::new());
        for parameter in &it.parameters {
            self.parameter(parameter, &it.parameters, &mut request, &mut reply)?;
        }
        Ok(Call {
            method: field_name(&it.name, it.at)?,
            name: it.name.clone(),
            camel,
            doc: it.doc.clone(),
            request,
            reply,
        })
    }

    fn switchless(&self, it: &Function) -> Made<Switchless> {
        let parameters: Made<Vec<Field>> =
            it.parameters.iter().map(|parameter| self.in_place(parameter)).collect();
        let parameters = parameters?;
        Ok(Switchless { method: field_name(&it.name, it.at)?, doc: it.doc.clone(), parameters })
    }

    /// A parameter of a switchless call: what goes over in a register.
    fn in_place(&self, it: &Declaration) -> Made<Field> {
        let carried = if it.attributes.user_check {
            Carried::Address
        } else if it.pointers == 0 && it.bounds.is_empty() {
            Carried::Value(self.element(it)?)
        } else {
            let what = format!("`{}` is copied, and its call makes no message", it.name);
            let remedy = "take `transition_using_threads` off, or pass a value or a `user_check`";
            return refuse(it.at, what, remedy);
        };
        let (name, plain) = (field_name(&it.name, it.at)?, it.name.clone());
        Ok(Field { name, plain, doc: it.doc.clone(), carried })
    }

    fn parameter(
        &self,
        it: &Declaration,
        all: &[Declaration],
        request: &mut Vec<Field>,
        reply: &mut Vec<Field>,
    ) -> Made<()> {
        let attributes = &it.attributes;
        let name = field_name(&it.name, it.at)?;
        let field = |carried| Field {
            name: name.clone(),
            plain: it.name.clone(),
            doc: it.doc.clone(),
            carried,
        };
        if attributes.user_check {
            request.push(field(Carried::Address));
            return Ok(());
        }
        if it.pointers == 0 && it.bounds.is_empty() {
            if let Some(buffer) = sized_input(it, all)? {
                // The buffer's own length says it.
                unsigned_limit(it, buffer)?;
                return Ok(());
            }
            request.push(field(Carried::Value(self.array(it)?)));
            return Ok(());
        }
        if it.pointers > 1 {
            let remedy = "pass one level: what the inner pointer points to is not copied";
            return refuse(it.at, format!("`{}` is a pointer to a pointer", it.name), remedy);
        }
        if attributes.string {
            if attributes.output {
                let remedy = "take `in` and the string in, and hand a buffer out with `size`";
                return refuse(it.at, format!("`{}` is a string in and out", it.name), remedy);
            }
            request.push(field(Carried::Text));
            return Ok(());
        }
        if let Some((element, length)) = self.buffer(it)? {
            let Some(parameter) = all.iter().find(|other| other.name == length) else {
                return Ok(()); // Refused by the check before.
            };
            let limit = unsigned_limit(parameter, it)?;
            if attributes.input {
                request.push(field(Carried::Input { element: element.clone(), limit }));
            }
            if attributes.output {
                let limit = if attributes.input {
                    Limit::Length(name.clone())
                } else {
                    Limit::Value(field_name(&length, parameter.at)?)
                };
                reply.push(field(Carried::Output { element, limit }));
            }
            return Ok(());
        }
        let value = match (&attributes.size, &attributes.count) {
            (Some(Amount::Number(number)), _) | (None, Some(Amount::Number(number))) => {
                let mut array = it.clone();
                array.bounds = vec![*number];
                if it.base == Base::Plain("void") {
                    array.base = Base::Plain("uint8_t");
                }
                self.array(&array)?
            }
            _ => self.array(it)?,
        };
        if attributes.input {
            request.push(field(Carried::Value(value.clone())));
        }
        if attributes.output {
            reply.push(field(Carried::Value(value)));
        }
        Ok(())
    }

    /// The element and the length parameter of a buffer whose length is a parameter.
    fn buffer(&self, it: &Declaration) -> Made<Option<(String, String)>> {
        let bytes = matches!(it.base, Base::Plain("void" | "char" | "unsigned char" | "uint8_t"));
        match (&it.attributes.size, &it.attributes.count) {
            (Some(_), Some(_)) => refuse(
                it.at,
                format!("`{}` has both size and count", it.name),
                "keep `count` for elements or `size` for bytes",
            ),
            (Some(_), None) if !bytes => refuse(
                it.at,
                format!("`{}` has a size in bytes and elements that are wider", it.name),
                "use `count`, in elements",
            ),
            (Some(Amount::Name(_)), None) if it.base == Base::Plain("void") => {
                let Some(Amount::Name(length)) = &it.attributes.size else { return Ok(None) };
                Ok(Some(("u8".to_owned(), length.clone())))
            }
            (Some(Amount::Name(length)), None) | (None, Some(Amount::Name(length))) => {
                Ok(Some((self.element(it)?, length.clone())))
            }
            _ => Ok(None),
        }
    }
}

/// The `[in]` buffer whose length `it` is.
fn sized_input<'a>(it: &Declaration, all: &'a [Declaration]) -> Made<Option<&'a Declaration>> {
    let named = Some(Amount::Name(it.name.clone()));
    let mut sized = all
        .iter()
        .filter(|other| other.attributes.size == named || other.attributes.count == named);
    let (first, second) = (sized.next(), sized.next());
    let inputs = [first, second].iter().flatten().any(|buffer| buffer.attributes.input);
    if let Some(second) = second
        && inputs
    {
        let what = format!("`{}` is the length of two buffers, one of them in", it.name);
        return refuse(second.at, what, "give each buffer a length of its own");
    }
    Ok(first.filter(|buffer| buffer.attributes.input))
}

/// The largest length that the parameter `it` can hold for `buffer`.
fn unsigned_limit(it: &Declaration, buffer: &Declaration) -> Made<u64> {
    match it.base {
        Base::Plain("unsigned char" | "uint8_t") => Ok(u64::from(u8::MAX)),
        Base::Plain("unsigned short" | "uint16_t") => Ok(u64::from(u16::MAX)),
        Base::Plain("unsigned int" | "uint32_t") => Ok(u64::from(u32::MAX)),
        Base::Plain("unsigned long" | "unsigned long long" | "uint64_t" | "size_t") => Ok(u64::MAX),
        _ => refuse(
            it.at,
            format!("`{}`, the length of `{}`, is not unsigned", it.name, buffer.name),
            "use size_t or an unsigned type of stdint.h",
        ),
    }
}

fn variants(it: &Composite, camel: &str, values: &mut BTreeMap<String, u64>) -> Made<Vec<Variant>> {
    let (mut names, mut used) = (BTreeSet::new(), BTreeSet::new());
    let mut variants = Vec::new();
    let mut next = 0_u64;
    for enumerator in &it.enumerators {
        let at = enumerator.at;
        let number = match &enumerator.value {
            None => next,
            Some(Amount::Number(number)) => *number,
            Some(Amount::Name(name)) => values.get(name).copied().unwrap_or(next),
        };
        let value = match u32::try_from(number) {
            Ok(value) if value <= i32::MAX.cast_unsigned() => value,
            _ => {
                let what = format!("`{}` does not fit an int", enumerator.name);
                return refuse(at, what, "keep it below 2^31");
            }
        };
        // The enumerator FILE_OPEN of enum file is the variant Open of File.
        let long = names::camel(&enumerator.name);
        let short = long.strip_prefix(camel).filter(|short| names::free_type(short));
        let name = short.unwrap_or(&long).to_owned();
        if !names::free_type(&name) || !names.insert(name.clone()) || !used.insert(value) {
            let what = format!("`{}` has a name or value that is taken", enumerator.name);
            return refuse(at, what, "give each enumerator a name and a value of its own");
        }
        values.insert(enumerator.name.clone(), number);
        next = number + 1;
        variants.push(Variant { name, value, doc: enumerator.doc.clone() });
    }
    Ok(variants)
}
