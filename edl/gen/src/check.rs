//! What the grammar allows and `sgx_edger8r` refuses all the same.
//!
//! Where it is not known what the tool does (a size of zero, an array with `const`), the
//! stricter reading is taken: what passes here passes there.

use crate::ast::{Amount, Base, Composite, Declaration, Function, Interface, Keyword};
use crate::error::{Fault, Position, refuse};
use std::collections::{BTreeMap, BTreeSet};

type Checked = Result<(), Fault>;

/// Refuses an interface that breaks a rule, at the first place where it does.
pub(crate) fn check(interface: &Interface) -> Checked {
    let tags = tags(interface)?;
    let known = Known { tags: &tags, headers: !interface.includes.is_empty() };
    let mut enumerators = BTreeSet::new();
    for composite in &interface.composites {
        self::composite(composite, &known, &mut enumerators)?;
    }
    let mut names = BTreeSet::new();
    for function in interface.trusted.iter().chain(&interface.untrusted) {
        if !names.insert(function.name.as_str()) {
            let what = format!("function `{}` is declared twice", function.name);
            return refuse(function.at, what, "give each function of the file its own name");
        }
        self::function(function, &known)?;
    }
    for function in &interface.untrusted {
        allowed(function, interface)?;
    }
    match interface.trusted.first() {
        Some(first) if interface.trusted.iter().all(|function| !function.public) => refuse(
            first.at,
            "no trusted function is public",
            "write `public` before at least one: an enclave needs an entry",
        ),
        _ => Ok(()),
    }
}

struct Known<'a> {
    tags: &'a BTreeMap<&'a str, Keyword>,
    headers: bool,
}

fn tags(interface: &Interface) -> Result<BTreeMap<&str, Keyword>, Fault> {
    let mut tags = BTreeMap::new();
    for composite in &interface.composites {
        if let Some(name) = &composite.name
            && tags.insert(name.as_str(), composite.keyword).is_some()
        {
            let remedy = "structs, unions and enums share one set of names: choose another";
            return refuse(composite.at, format!("`{name}` is defined twice"), remedy);
        }
    }
    Ok(tags)
}

fn composite<'a>(
    composite: &'a Composite,
    known: &Known<'_>,
    enumerators: &mut BTreeSet<&'a str>,
) -> Checked {
    let name = composite.name.as_deref().unwrap_or("without a name");
    if composite.members.is_empty() && composite.enumerators.is_empty() {
        let what = format!("{} {name} has nothing in it", composite.keyword);
        return refuse(composite.at, what, "give it a member or take it out");
    }
    for enumerator in &composite.enumerators {
        if let Some(Amount::Name(value)) = &enumerator.value
            && !enumerators.contains(value.as_str())
        {
            let remedy = "use a number or an enumerator that stands before it";
            return refuse(enumerator.at, format!("`{value}` is no earlier enumerator"), remedy);
        }
        if !enumerators.insert(&enumerator.name) {
            let what = format!("enumerator `{}` is defined twice", enumerator.name);
            return refuse(enumerator.at, what, "enumerators of all enums share one set of names");
        }
    }
    let mut names = BTreeSet::new();
    for member in &composite.members {
        if !names.insert(member.name.as_str()) {
            let what = format!("member `{}` stands twice in {name}", member.name);
            return refuse(member.at, what, "give each member its own name");
        }
        self::member(member, composite, known)?;
    }
    Ok(())
}

fn member(member: &Declaration, composite: &Composite, known: &Known<'_>) -> Checked {
    declared(member, known)?;
    if member.constant {
        let remedy = "take `const` out: the grammar has it for parameters only";
        return refuse(member.at, format!("member `{}` is const", member.name), remedy);
    }
    let attributes = &member.attributes;
    let directed = attributes.input
        || attributes.output
        || attributes.user_check
        || attributes.string
        || attributes.wstring
        || attributes.isptr
        || attributes.isary
        || attributes.readonly;
    let at = attributes.at.unwrap_or(member.at);
    if directed {
        let what = format!("member `{}` has an attribute of parameters", member.name);
        return refuse(at, what, "keep only `size` and `count`, which a pointer member may have");
    }
    if attributes.at.is_some() && (member.pointers == 0 || composite.keyword != Keyword::Struct) {
        let what = format!("`size` or `count` on member `{}`", member.name);
        return refuse(at, what, "take it out: it goes with a pointer in a struct");
    }
    sizes(member, &composite.members, at)
}

fn function(function: &Function, known: &Known<'_>) -> Checked {
    let returns = &function.returns;
    tag(&returns.base, returns.at, known)?;
    let mut names = BTreeSet::new();
    for parameter in &function.parameters {
        if !names.insert(parameter.name.as_str()) {
            let what = format!("`{}` has two parameters `{}`", function.name, parameter.name);
            return refuse(parameter.at, what, "give each parameter its own name");
        }
        declared(parameter, known)?;
        self::parameter(parameter, &function.parameters)?;
    }
    Ok(())
}

/// What holds for members and parameters alike.
fn declared(it: &Declaration, known: &Known<'_>) -> Checked {
    let name = &it.name;
    tag(&it.base, it.at, known)?;
    if it.pointers > 0 && !it.bounds.is_empty() {
        let remedy = "use a struct, or a pointer to a pointer with `user_check`";
        return refuse(it.at, format!("`{name}` is an array of pointers"), remedy);
    }
    if it.base == Base::Plain("void") && it.pointers == 0 {
        let remedy = "write `void*` or give it a type";
        return refuse(it.at, format!("`{name}` is of type void"), remedy);
    }
    if it.constant && it.pointers == 0 {
        let remedy = "take `const` out: it goes with pointers only";
        return refuse(it.at, format!("`{name}` is const and not a pointer"), remedy);
    }
    Ok(())
}

fn tag(base: &Base, at: Position, known: &Known<'_>) -> Checked {
    match base {
        Base::Plain(_) => Ok(()),
        Base::Tagged(keyword, name) => match known.tags.get(name.as_str()) {
            Some(defined) if defined != keyword => {
                let what = format!("`{name}` is a {defined}, not a {keyword}");
                refuse(at, what, format!("write `{defined} {name}`"))
            }
            None if !known.headers => {
                let what = format!("`{keyword} {name}` is not defined");
                refuse(at, what, "define it in this file or include the C header that does")
            }
            _ => Ok(()),
        },
        Base::Named(name) if !known.tags.contains_key(name.as_str()) && !known.headers => {
            let what = format!("type `{name}` is not defined");
            refuse(at, what, "define it in this file or include the C header that does")
        }
        Base::Named(_) => Ok(()),
    }
}

fn parameter(it: &Declaration, all: &[Declaration]) -> Checked {
    let (name, attributes) = (&it.name, &it.attributes);
    let at = attributes.at.unwrap_or(it.at);
    let array = !it.bounds.is_empty();
    // A name from a C header can hide a pointer or an array.
    let hidden = matches!(it.base, Base::Named(_)) && it.pointers == 0 && !array;
    let directed = attributes.input || attributes.output;
    let text = attributes.string || attributes.wstring;
    let sized = attributes.size.is_some() || attributes.count.is_some();

    for (set, word) in [
        (attributes.isptr, "isptr"),
        (attributes.isary, "isary"),
        (attributes.readonly, "readonly"),
    ] {
        if set && !hidden {
            let remedy = "take it out: it tells what a type name of a C header hides";
            return refuse(at, format!("`{word}` on `{name}`"), remedy);
        }
    }
    if attributes.isptr && attributes.isary {
        return refuse(at, format!("`{name}` is both isptr and isary"), "keep one");
    }
    if attributes.isary && sized {
        let remedy = "take them out: an array has its own size";
        return refuse(at, format!("`{name}` has isary and a size"), remedy);
    }
    if attributes.readonly && !attributes.isptr {
        let remedy = "add `isptr`: it tells of a pointer that a name hides";
        return refuse(at, format!("`{name}` is readonly and not a pointer"), remedy);
    }
    let points = it.pointers > 0 || array || attributes.isptr || attributes.isary;
    if !points {
        return match attributes.at {
            Some(at) => refuse(
                at,
                format!("attributes on `{name}`, which is neither a pointer nor an array"),
                "take them out, or make it a pointer",
            ),
            None => Ok(()),
        };
    }
    if attributes.user_check && directed {
        let remedy = "keep either the direction (copied) or `user_check` (not copied)";
        return refuse(at, format!("`{name}` has a direction and user_check"), remedy);
    }
    if (sized || text) && !directed {
        let what = format!("`{name}` has a size, a count or string and no direction");
        return refuse(at, what, "add `in`, `out` or both");
    }
    if !directed && !attributes.user_check {
        let remedy = "add `in`, `out`, both, or `user_check`";
        return refuse(at, format!("`{name}` is a pointer without a direction"), remedy);
    }
    if text {
        self::text(it, at)?;
    }
    if array && sized {
        let remedy = "take `size` and `count` out: an array has its own size";
        return refuse(at, format!("`{name}` is an array with a size"), remedy);
    }
    if it.base == Base::Plain("void") && it.pointers == 1 && directed && attributes.size.is_none() {
        let remedy = "add `size=` with the number of bytes, or use `user_check`";
        return refuse(at, format!("`{name}` is void* with a direction and no size"), remedy);
    }
    if (it.constant || attributes.readonly) && attributes.output {
        let remedy = "take out `const` or `out`: what is written cannot be constant";
        return refuse(at, format!("`{name}` is constant and out"), remedy);
    }
    sizes(it, all, at)
}

fn text(it: &Declaration, at: Position) -> Checked {
    let (name, attributes) = (&it.name, &it.attributes);
    if attributes.string && attributes.wstring {
        return refuse(at, format!("`{name}` is both string and wstring"), "keep one");
    }
    if attributes.size.is_some() || attributes.count.is_some() {
        let remedy = "take out `size` and `count`: a string ends with its NUL";
        return refuse(at, format!("`{name}` is a string with a size"), remedy);
    }
    if attributes.output && !attributes.input {
        let remedy = "add `in`, or use a buffer with `size`: an unwritten string has no length";
        return refuse(at, format!("`{name}` is a string and only out"), remedy);
    }
    let wanted = if attributes.string { "char" } else { "wchar_t" };
    let fits = attributes.isptr || (it.base == Base::Plain(wanted) && it.pointers == 1);
    if fits && it.bounds.is_empty() {
        Ok(())
    } else {
        let attribute = if attributes.string { "string" } else { "wstring" };
        let what = format!("`{attribute}` on `{name}`, which is not a {wanted}*");
        refuse(at, what, format!("make it {wanted}* or take `{attribute}` out"))
    }
}

/// `size` and `count` are numbers above zero or name an integer beside them.
fn sizes(it: &Declaration, all: &[Declaration], at: Position) -> Checked {
    let attributes = &it.attributes;
    for (word, amount) in [("size", &attributes.size), ("count", &attributes.count)] {
        match amount {
            Some(Amount::Number(0)) => {
                let what = format!("`{word}` of `{}` is 0", it.name);
                return refuse(at, what, "give a number above 0");
            }
            Some(Amount::Name(name)) => {
                let fits = all.iter().any(|other| other.name == *name && integer(other));
                if !fits {
                    let what = format!("`{word}={name}` names no integer beside `{}`", it.name);
                    let remedy = "name a parameter or member of integer type passed by value";
                    return refuse(at, what, remedy);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether `it` is an integer by value, or may be one by a C header.
fn integer(it: &Declaration) -> bool {
    let plain = match &it.base {
        Base::Plain(name) => !matches!(*name, "void" | "float" | "double" | "long double"),
        Base::Named(_) => !it.attributes.isptr && !it.attributes.isary,
        Base::Tagged(keyword, _) => *keyword == Keyword::Enum,
    };
    plain && it.pointers == 0 && it.bounds.is_empty()
}

fn allowed(function: &Function, interface: &Interface) -> Checked {
    let mut names = BTreeSet::new();
    for (name, at) in &function.allow {
        if !names.insert(name.as_str()) {
            return refuse(*at, format!("`{name}` is allowed twice"), "keep one");
        }
        let known = interface.trusted.iter().any(|trusted| trusted.name == *name);
        if !known && interface.imports.is_empty() {
            let what = format!("`{name}` is no trusted function");
            return refuse(*at, what, "declare it in `trusted { ... };` or take it out");
        }
    }
    Ok(())
}
