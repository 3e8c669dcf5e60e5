/* guard.so, as it is in the program that places it beside the emulator: nothing to be found, installed or exchanged apart. */
#include "guard/guard.h"

__asm__(".section .rodata\n"
        ".global guard_image, guard_image_end\n"
        "guard_image: .incbin \"build/guard.so\"\n"
        "guard_image_end:\n"
        ".previous\n");
