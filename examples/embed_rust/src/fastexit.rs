//! A safe wrapper: fastexit.h's [vcpu] is a `&mut Vcpu`, [any] a `&Machine`, [alone] a `&mut Machine` beside no Vcpu.
use crate::sys::*;
use std::{ffi::CStr, marker::PhantomData, ptr};

pub struct Machine(*mut fx_machine, u32);
pub struct Vcpu<'m>(*mut fx_machine, pub u32, PhantomData<&'m Machine>);
unsafe impl Send for Machine {}
unsafe impl Sync for Machine {}
unsafe impl Send for Vcpu<'_> {}

/// What a call wrote; its status is in it.
fn filled(call: impl FnOnce(*mut fx_result) -> i32) -> fx_result {
    let mut result = fx_result::default();
    result.status = call(&mut result);
    result
}

impl Machine {
    /// A machine in x2APIC mode; without one, the line that says why.
    pub fn open(vcpus: u32) -> Result<Machine, String> {
        let (config, mut m) = (fx_config::new(vcpus, FX_BOOT_X2APIC), ptr::null_mut());
        match unsafe { fx_open(&config, ptr::null(), &mut m, ptr::null_mut()) } {
            0 => Ok(Machine(m, vcpus)),
            _ => Err(unsafe { CStr::from_ptr(fx_last_error()) }.to_string_lossy().into_owned()),
        }
    }
    /// Every vCPU, each for one thread at a time, and the machine beside them.
    pub fn split(&mut self) -> (&Machine, Vec<Vcpu<'_>>) {
        (self, (0..self.1).map(|index| Vcpu(self.0, index, PhantomData)).collect())
    }
    pub fn inject(&self, address: u64, data: u32) -> fx_result {
        filled(|result| unsafe { fx_inject(self.0, address, data, result) })
    }
    pub fn snapshot(&mut self) -> Vec<u8> {
        let mut needed = 0;
        unsafe { fx_snapshot(self.0, ptr::null_mut(), 0, &mut needed) };
        let mut bytes = vec![0; needed as usize];
        assert_eq!(unsafe { fx_snapshot(self.0, bytes.as_mut_ptr().cast(), needed, &mut needed) }, 0);
        bytes
    }
}

impl Vcpu<'_> {
    pub fn wrmsr(&mut self, msr: u32, value: u64) -> fx_result {
        filled(|result| unsafe { fx_wrmsr(self.0, self.1, msr, value, result) })
    }
    pub fn exit(&mut self, reason: u32, msr: u32, value: u64) -> fx_result {
        let exit = fx_exit { vcpu: self.1, reason, msr, info: 0, value, gpa: 0 };
        filled(|result| unsafe { fx_exit(self.0, &exit, result) })
    }
    pub fn notify(&mut self) -> bool {
        unsafe { fx_notify(self.0, self.1) == 0 }
    }
    pub fn ack(&mut self) -> Option<u32> {
        let mut vector = 0;
        (unsafe { fx_ack(self.0, self.1, &mut vector) } == 0).then_some(vector)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        unsafe { fx_close(self.0) };
    }
}
