//! An EDL file as a tree, and its canonical spelling.
//!
//! [`Interface`]'s `Display` is the normal form: one declaration a line, no comments, one spelling
//! for each type. Two files with the same normal form describe the same boundary.

use crate::error::Position;
use core::fmt;

/// A whole EDL file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// C headers, in order, each where it stands.
    pub includes: Vec<(String, Position)>,
    /// Other EDL files that functions are taken from.
    pub imports: Vec<Import>,
    /// struct, union and enum definitions, in order.
    pub composites: Vec<Composite>,
    /// Functions of the `trusted` sections (ECALLs), in order.
    pub trusted: Vec<Function>,
    /// Functions of the `untrusted` sections (OCALLs), in order.
    pub untrusted: Vec<Function>,
}

/// `from "file" import names;`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The other file.
    pub file: String,
    /// The functions; empty for `*`.
    pub names: Vec<String>,
    /// Where the line stands.
    pub at: Position,
}

/// Which of the three composite types, as its keyword.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keyword {
    /// `struct`
    Struct,
    /// `union`
    Union,
    /// `enum`
    Enum,
}

/// A struct, union or enum definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Composite {
    /// Which.
    pub keyword: Keyword,
    /// The tag; `None` for an enum without one.
    pub name: Option<String>,
    /// Members of a struct or union.
    pub members: Vec<Declaration>,
    /// Enumerators of an enum.
    pub enumerators: Vec<Enumerator>,
    /// The comments at it.
    pub doc: String,
    /// Where the name, or else the keyword, stands.
    pub at: Position,
}

/// A name in an enum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enumerator {
    /// The name.
    pub name: String,
    /// What follows `=`.
    pub value: Option<Amount>,
    /// The comments at it.
    pub doc: String,
    /// Where it stands.
    pub at: Position,
}

/// A number or the name of something that has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Amount {
    /// A number.
    Number(u64),
    /// A name.
    Name(String),
}

/// A type without pointers and array bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// A type of C or of `stdint.h`, in canonical spelling.
    Plain(&'static str),
    /// `struct x`, `union x` or `enum x`.
    Tagged(Keyword, String),
    /// A bare name: a tag of this file or a type of an included header.
    Named(String),
}

/// A parameter, a member, or (with an empty name) a returned type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// What stands in brackets before it.
    pub attributes: Attributes,
    /// Leading `const`.
    pub constant: bool,
    /// The type.
    pub base: Base,
    /// Number of `*`.
    pub pointers: u32,
    /// The name.
    pub name: String,
    /// Array bounds.
    pub bounds: Vec<u64>,
    /// The comments at it.
    pub doc: String,
    /// Where the name stands.
    pub at: Position,
}

/// The bracketed attributes of a parameter or member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Where the bracket opens; `None` if there is none.
    pub at: Option<Position>,
    /// `in`
    pub input: bool,
    /// `out`
    pub output: bool,
    /// `user_check`
    pub user_check: bool,
    /// `string`
    pub string: bool,
    /// `wstring`
    pub wstring: bool,
    /// `isptr`
    pub isptr: bool,
    /// `isary`
    pub isary: bool,
    /// `readonly`
    pub readonly: bool,
    /// `size=`, in bytes.
    pub size: Option<Amount>,
    /// `count=`, in elements.
    pub count: Option<Amount>,
}

/// A function of a trusted or untrusted section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// What it returns; the name is empty.
    pub returns: Declaration,
    /// Its name.
    pub name: String,
    /// Its parameters, in order.
    pub parameters: Vec<Declaration>,
    /// Trusted only: may be called from outside at any time.
    pub public: bool,
    /// Untrusted only: trusted functions that may be called while it runs.
    pub allow: Vec<(String, Position)>,
    /// Untrusted only.
    pub propagate_errno: bool,
    /// A switchless call.
    pub transition_using_threads: bool,
    /// Untrusted only: `cdecl`, `stdcall`, `fastcall`.
    pub convention: Option<&'static str>,
    /// Untrusted only.
    pub dllimport: bool,
    /// The comments at it.
    pub doc: String,
    /// Where its name stands.
    pub at: Position,
}

impl fmt::Display for Keyword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Struct => "struct",
            Self::Union => "union",
            Self::Enum => "enum",
        })
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(name) => f.write_str(name),
            Self::Tagged(keyword, name) => write!(f, "{keyword} {name}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words: Vec<String> = [
            (self.input, "in"),
            (self.output, "out"),
            (self.user_check, "user_check"),
            (self.string, "string"),
            (self.wstring, "wstring"),
            (self.isptr, "isptr"),
            (self.isary, "isary"),
            (self.readonly, "readonly"),
        ]
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, word)| (*word).to_owned())
        .collect();
        words.extend(self.size.iter().map(|amount| format!("size={amount}")));
        words.extend(self.count.iter().map(|amount| format!("count={amount}")));
        if words.is_empty() { Ok(()) } else { write!(f, "[{}] ", words.join(", ")) }
    }
}

impl fmt::Display for Declaration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let constant = if self.constant { "const " } else { "" };
        write!(f, "{}{constant}{}", self.attributes, self.base)?;
        for _ in 0..self.pointers {
            f.write_str("*")?;
        }
        if !self.name.is_empty() {
            write!(f, " {}", self.name)?;
        }
        self.bounds.iter().try_for_each(|bound| write!(f, "[{bound}]"))
    }
}

impl fmt::Display for Composite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.keyword)?;
        if let Some(name) = &self.name {
            write!(f, " {name}")?;
        }
        f.write_str(" {")?;
        self.members.iter().try_for_each(|member| write!(f, " {member};"))?;
        for (n, enumerator) in self.enumerators.iter().enumerate() {
            write!(f, "{} {}", if n == 0 { "" } else { "," }, enumerator.name)?;
            if let Some(value) = &enumerator.value {
                write!(f, " = {value}")?;
            }
        }
        f.write_str(" };")
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.public {
            f.write_str("public ")?;
        }
        let convention: Vec<&str> =
            self.convention.into_iter().chain(self.dllimport.then_some("dllimport")).collect();
        if !convention.is_empty() {
            write!(f, "[{}] ", convention.join(", "))?;
        }
        let parameters: Vec<String> = self.parameters.iter().map(ToString::to_string).collect();
        write!(f, "{} {}({})", self.returns, self.name, parameters.join(", "))?;
        if !self.allow.is_empty() {
            let names: Vec<&str> = self.allow.iter().map(|(name, _)| name.as_str()).collect();
            write!(f, " allow({})", names.join(", "))?;
        }
        if self.propagate_errno {
            f.write_str(" propagate_errno")?;
        }
        if self.transition_using_threads {
            f.write_str(" transition_using_threads")?;
        }
        f.write_str(";")
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "enclave {{")?;
        self.includes.iter().try_for_each(|(file, _)| writeln!(f, "include \"{file}\""))?;
        for import in &self.imports {
            let names =
                if import.names.is_empty() { "*".to_owned() } else { import.names.join(", ") };
            writeln!(f, "from \"{}\" import {names};", import.file)?;
        }
        self.composites.iter().try_for_each(|composite| writeln!(f, "{composite}"))?;
        for (section, functions) in [("trusted", &self.trusted), ("untrusted", &self.untrusted)] {
            if !functions.is_empty() {
                writeln!(f, "{section} {{")?;
                functions.iter().try_for_each(|function| writeln!(f, "{function}"))?;
                writeln!(f, "}};")?;
            }
        }
        writeln!(f, "}};")
    }
}
