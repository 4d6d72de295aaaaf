//! What of fastexit_calls.h this host uses, by hand. All of it, by bindgen:
//!     bindgen build/fastexit_calls.h --allowlist-item '(fx|FX)_.*' --with-derive-default --with-derive-partialeq -o src/sys.rs
#![allow(non_camel_case_types)]
use std::ffi::{c_char, c_void};

pub const FX_ABI_VERSION: u32 = 7;
pub const FX_BOOT_X2APIC: u32 = 1;

#[repr(C)]
pub struct fx_machine {
    _opaque: [u8; 0],
}

#[repr(C)]
#[rustfmt::skip]
pub struct fx_config {
    pub size: u32, pub abi: u32, pub vcpus: u32, pub vendor: u32, pub kernel: u32, pub flags: u32,
    pub apic_ids: *const u32, pub rest: [u32; 10], pub costs: *const c_char,
}

impl fx_config {
    /// 0 in every other field is the default. Bindgen's has derive(Default) instead.
    pub fn new(vcpus: u32, flags: u32) -> Self {
        let size = std::mem::size_of::<Self>() as u32;
        Self { size, abi: FX_ABI_VERSION, vcpus, flags, ..unsafe { std::mem::zeroed() } }
    }
}

#[repr(C)]
#[rustfmt::skip]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct fx_result {
    pub completion: u8, pub path: u8, pub fault: u8, pub refusal: u8, pub accepted: i16, pub user: u8, pub effects: u8,
    pub value: u64, pub status: i32, pub vcpu: u32, pub target: u32, pub vector: u32,
    pub cycles_ipi: u64, pub cycles: u64, pub cycles_spent: u64,
}

#[repr(C)]
#[rustfmt::skip]
pub struct fx_exit { pub vcpu: u32, pub reason: u32, pub msr: u32, pub info: u32, pub value: u64, pub gpa: u64 }

#[link(name = "fastexit")]
#[rustfmt::skip]
extern "C" {
    pub fn fx_open(config: *const fx_config, hooks: *const c_void, m: *mut *mut fx_machine, ops: *mut c_void) -> i32;
    pub fn fx_close(m: *mut fx_machine) -> i32;
    pub fn fx_last_error() -> *const c_char;
    pub fn fx_wrmsr(m: *mut fx_machine, vcpu: u32, msr: u32, value: u64, result: *mut fx_result) -> i32;
    pub fn fx_exit(m: *mut fx_machine, exit: *const fx_exit, result: *mut fx_result) -> i32;
    pub fn fx_notify(m: *mut fx_machine, vcpu: u32) -> i32;
    pub fn fx_ack(m: *mut fx_machine, vcpu: u32, vector: *mut u32) -> i32;
    pub fn fx_inject(m: *mut fx_machine, address: u64, data: u32, result: *mut fx_result) -> i32;
    pub fn fx_snapshot(m: *mut fx_machine, buffer: *mut c_void, size: u64, needed: *mut u64) -> i32;
}
